"""A report of training runs as one HTML file that needs no other: curves, gradients, time, settings, events."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..control.error_control import DEFAULT_TARGET
from .config import TrainConfig
from .metrics import settings_of
from .plots import loss_curves
from .trace_picture import Step

Lines = Sequence[Mapping[str, Any]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { font-weight: 600 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem } img { max-width: 100% }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #eee; vertical-align: top }
.scroll { overflow-x: auto }
"""


def report_page(runs: Mapping[str, Lines], traced: Mapping[str, tuple[Step, bytes]], over: str = "steps") -> str:
    """The page.

    Args:
        runs: by label, lines of metrics.jsonl, each with a loss somewhere.
        traced: of those runs that have a trace, its last step and the picture of that.
        over: what curves are drawn over, a key of :data:`mlpint.training.plots.OVER`.

    Raises:
        UserError: a run that has not recorded what the curves are to be drawn over, or no matplotlib.
    """
    title = ", ".join(runs)
    parts = [f"<h1>mlpint: {_text(title)}</h1>", _overview(runs)]
    curves = loss_curves(runs, over, _target(runs))
    parts += ["<h2>Loss and gradients</h2>", _image(curves, "loss and what was measured in training")]
    for label, (step, picture) in traced.items():
        parts += [f"<h2>A step of {_text(label)}</h2>", *_step(step, picture)]
    parts += ["<h2>Events</h2>", *(_events(label, lines) for label, lines in runs.items())]
    parts += ["<h2>Settings</h2>", _settings(runs), "<h2>Machines and versions</h2>", _machines(runs)]
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def summary(lines: Lines) -> dict[str, str]:
    """What a run came to, by the names of the overview's columns; empty where nothing is known."""
    steps = [line for line in lines if "loss" in line]
    header, last = header_of(lines), steps[-1]
    model, solver = (header.get("config", {}).get(name, {}) for name in ("model", "solver"))
    held_out = [line["val_loss"] for line in steps if line.get("val_loss") is not None]
    compared = next((line["comparison"] for line in reversed(lines) if "comparison" in line), None)
    seconds = [line["seconds"] for line in steps]
    exact = sum(line["mode"] == "exact" for line in steps)
    return {
        "network": f"{model.get('task', '')}, {model.get('layers', '?')} layers, dim {model.get('dim', '?')}",
        "ranks": str(header.get("ranks", "?")),
        "gradients": f"{last['mode']}, {exact} of {len(steps)} steps exact",
        "mu": f"{last['consistency']:.3g}" if "consistency" in last else "none",
        "steps": str(last["step"]),
        "held-out loss": f"{held_out[-1]:.4f}" if held_out else "",
        "cosine to the exact gradient": f"{compared['gradient_cosine']:.4f}" if compared else "",
        "against serial, same ranks": f"{compared['exact_seconds'] / compared['seconds']:.2f}x" if compared else "",
        "seconds a step": f"{statistics.median(seconds):.3f}",
        "minutes": f"{sum(seconds) / 60:.1f}",
        "error control": str(solver.get("control", "")),
    }


def header_of(lines: Lines) -> Mapping[str, Any]:
    """The last header of a metrics.jsonl: a resumed run has several."""
    return next((line for line in reversed(lines) if "config" in line), {})


def target_of(lines: Lines) -> float:
    """What error control was to keep to, a cosine or a convergence factor; 0 where there was none."""
    try:
        solver = TrainConfig.of(settings_of(header_of(lines))).solver
    except ValueError:  # of another version of mlpint
        return 0.0
    return 0.0 if solver.measure is None else solver.control_target or DEFAULT_TARGET[solver.measure]


def _target(runs: Mapping[str, Lines]) -> float:
    """The one that all runs share; 0 where they do not."""
    targets = {target_of(lines) for lines in runs.values()}
    return targets.pop() if len(targets) == 1 else 0.0


def _overview(runs: Mapping[str, Lines]) -> str:
    summaries = {label: summary(lines) for label, lines in runs.items()}
    names = list(next(iter(summaries.values())))
    return _table(["", *runs], ([name, *(s[name] for s in summaries.values())] for name in names))


def _step(step: Step, picture: bytes) -> Iterator[str]:
    spent = {kind: rows for kind, rows in step.seconds().items() if any(rows)}
    whole = (step.end - step.begin) / 1e3
    yield _image(picture, "what ranks and layers do in one step")
    yield _table(
        ["milliseconds, and share of the step", *(f"rank {rank}" for rank in step.ranks)],
        ([kind, *(f"{1e3 * t:.1f} ({t / whole:.0%})" for t in rows)] for kind, rows in spent.items()),
    )


def _events(label: str, lines: Lines) -> str:
    rows = []
    for line in lines:
        control = line.get("control")
        if control:
            measured = control.get("measured") or {}
            cosine = measured.get("cosine")
            against = {"exact": "the exact sweep", "": ""}.get(measured.get("reference", ""), measured.get("reference"))
            found = "" if cosine is None else f"{cosine:.4f} against {against}"
            rows.append([str(line["step"]), control.get("action", ""), found, control.get("reason", "")])
    if not rows:
        return f"<p>{_text(label)}: none.</p>"
    return f"<h3>{_text(label)}</h3>" + _table(["step", "error control", "gradient cosine", "why"], rows)


def _settings(runs: Mapping[str, Lines]) -> str:
    """The keys that are not at their defaults in all of the runs."""
    defaults = TrainConfig().flat()
    given = [settings_of(header_of(lines)) for lines in runs.values()]
    names = [n for n in defaults if any(values.get(n, defaults[n]) != defaults[n] for values in given)]
    rows = ([n, *(str(values.get(n, "")) for values in given), str(defaults[n])] for n in names)
    return _table(["key", *runs, "default"], rows)


def _machines(runs: Mapping[str, Lines]) -> str:
    machines = [header_of(lines).get("machine", {}) for lines in runs.values()]
    names = dict.fromkeys(name for machine in machines for name in machine)
    return _table(["", *runs], ([name, *(str(m.get(name, "")) for m in machines)] for name in names))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>\n{body}</table></div>'


def _image(picture: bytes, alternative: str) -> str:
    data = base64.b64encode(picture).decode()
    return f'<img alt="{_text(alternative)}" src="data:image/png;base64,{data}">'


def _text(value: str) -> str:
    return html.escape(str(value))
