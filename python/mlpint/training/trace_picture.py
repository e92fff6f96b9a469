"""One step of a trace as a picture: a row for each rank, what it does by colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError

TRACE = "trace.json"
_COLOURS = {
    "chain": "tab:orange",
    "relaxation": "tab:blue",
    "last sweep": "tab:cyan",
    "exact sweep": "tab:purple",
    "serial layers": "tab:olive",
    "head": "tab:green",
    "error control": "tab:brown",
    "optimiser": "tab:gray",
    "wait": "tab:red",
    "share": "tab:red",
}


def draw_trace(trace: Path, picture: Path) -> None:
    """Draws the last step of a trace that ``mlpint train --trace`` wrote.

    Raises:
        UserError: the file is no such trace.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks, begin, end, number = _last_step(trace)
    figure = Figure(figsize=(11, 1.8 + 0.5 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    shown: dict[str, None] = {}
    for rank, events in ranks.items():
        for kind, colour in _COLOURS.items():
            spans = [(e["ts"] / 1e3 - begin, e["dur"] / 1e3) for e in events if e["name"] == kind]
            spans = [(at, width) for at, width in spans if 0 <= at < end - begin]
            if spans:
                shown["wait" if kind == "share" else kind] = None
                height = (rank - 0.4, 0.8) if kind not in ("wait", "share") else (rank - 0.2, 0.4)
                axes.broken_barh(spans, height, facecolors=colour, edgecolor="white", linewidth=0.2)
    axes.set(xlabel=f"milliseconds in step {number}", xlim=(0, end - begin), yticks=list(ranks))
    axes.set_yticklabels([f"rank {rank}" for rank in ranks])
    axes.invert_yaxis()
    patches = [Patch(color=_COLOURS[kind], label=kind) for kind in shown]
    figure.legend(handles=patches, loc="outside upper center", ncols=min(len(patches), 6) or 1, frameon=False)
    FigureCanvasAgg(figure).print_png(picture)


def _last_step(trace: Path) -> tuple[dict[int, list[dict[str, Any]]], float, float, int]:
    """The events of each rank, and begin, end (milliseconds) and number of the last step."""
    try:
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        spans = [e for e in events if e["ph"] == "X"]
        number = max(e["args"]["number"] for e in spans if e["name"] == "step")
        steps = [e for e in spans if e["name"] == "step" and e["args"]["number"] == number]
        begin, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
        ranks = {r: [e for e in spans if e["pid"] == r] for r in sorted({e["pid"] for e in spans})}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{trace}: is no trace of mlpint train ({error})") from None
    return ranks, begin / 1e3, end / 1e3, number
