"""One step of a trace as pictures: what each rank does over time, and when each layer is evaluated."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from .pictures import new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
_NAMES = {"share": "wait"}  # that a kind goes by in the pictures


class Step(NamedTuple):
    """The last step of a trace.

    Attributes:
        ranks: the events of each rank that begin in the step.
        begin, end: milliseconds.
        number: of the step.
    """

    ranks: dict[int, list[dict[str, Any]]]
    begin: float
    end: float
    number: int

    def seconds(self) -> dict[str, list[float]]:
        """By kind, what each rank spent on it; what is in nothing that has a name is "other"."""
        spent: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(self.ranks))
        for row, events in enumerate(self.ranks.values()):
            for event in events:
                if event["name"] in _COLOURS:
                    spent[_NAMES.get(event["name"], event["name"])][row] += event["dur"] / 1e6
        named = [sum(rows) for rows in zip(*spent.values(), strict=True)] or [0.0] * len(self.ranks)
        spent["other"] = [max((self.end - self.begin) / 1e3 - total, 0.0) for total in named]
        return dict(spent)


def last_step(trace: Path) -> Step:
    """Reads what ``mlpint train --trace`` wrote.

    Raises:
        UserError: the file is no such trace.
    """
    try:
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        spans = [e for e in events if e["ph"] == "X"]
        number = max(e["args"]["number"] for e in spans if e["name"] == "step")
        steps = [e for e in spans if e["name"] == "step" and e["args"]["number"] == number]
        begin, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
        inside = [e for e in spans if begin <= e["ts"] < end]
        ranks = {r: [e for e in inside if e["pid"] == r] for r in sorted({e["pid"] for e in spans})}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{trace}: is no trace of mlpint train ({error})") from None
    return Step(ranks, begin / 1e3, end / 1e3, number)


def draw_step(step: Step) -> bytes:
    """A PNG of a step: a row for each rank above, a row for each layer below.

    Raises:
        UserError: matplotlib is missing.
    """
    layers = 1 + max((n for es in step.ranks.values() for e in es for n in e["args"].get("layers", ())), default=-1)
    heights = [0.5 * len(step.ranks), 0.09 * layers]
    figure = new_figure(11, 2.0 + sum(heights))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=heights) if layers else (figure.subplots(), None)
    shown = _draw_ranks(above, step)
    if below is not None:
        _draw_layers(below, step, layers)
    (below or above).set_xlabel(f"milliseconds in step {step.number}")
    from matplotlib.patches import Patch

    patches = [Patch(color=_COLOURS[kind], label=kind) for kind in shown]
    figure.legend(handles=patches, loc="outside upper center", ncols=min(len(patches), 6) or 1, frameon=False)
    return png(figure)


def _draw_ranks(axes: Axes, step: Step) -> list[str]:
    """Returns the kinds that there are."""
    shown: dict[str, None] = {}
    for rank, events in step.ranks.items():
        for kind, colour in _COLOURS.items():
            spans = [(e["ts"] / 1e3 - step.begin, e["dur"] / 1e3) for e in events if e["name"] == kind]
            if spans:
                shown[_NAMES.get(kind, kind)] = None
                height = (rank - 0.4, 0.8) if kind not in ("wait", "share") else (rank - 0.2, 0.4)
                axes.broken_barh(spans, height, facecolors=colour, edgecolor="white", linewidth=0.2)
    axes.set(xlim=(0, step.end - step.begin), yticks=list(step.ranks))
    axes.set_yticklabels([f"rank {rank}" for rank in step.ranks])
    axes.invert_yaxis()
    return list(shown)


def _draw_layers(axes: Axes, step: Step, count: int) -> None:
    """Evaluations of a layer as bars in its row; of several in one call, one bar over the time of all."""
    for events in step.ranks.values():
        for event in events:
            for layer in event["args"].get("layers", ()):
                at = (event["ts"] / 1e3 - step.begin, event["dur"] / 1e3)
                axes.broken_barh([at], (layer - 0.45, 0.9), facecolors=_COLOURS.get(event["name"], "black"))
    axes.set(ylim=(-0.5, count - 0.5), ylabel="layer")
