"""Loss curves as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from .pictures import new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What checks of error control measure, with the axis it is drawn on.
_CHECKS = {"cosine": "1 - gradient cosine", "factor": "convergence factor"}
_SMALLEST = 1e-6  # that is drawn: an exact gradient's would be 0
OVER = {
    "steps": "optimiser step",
    "flops": "training FLOPs of the blocks",
    "flops-all": "training FLOPs",
    "tokens": "tokens",
    "seconds": "seconds of training",
}
_FILLED = "filled: against the exact sweep; hollow: against one more iteration"


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], over: str = "steps", target: float = 0.0) -> bytes:
    """A PNG of training loss (each step faint, its running mean as a line) and validation loss.

    Where the solver's options change, a dotted line names the new ones. Below are pictures of what else was measured in
    validation, and of what the checks of error control measured, where there is any. Of multilevel training the
    training loss is the fine network's.

    Args:
        runs: by label, lines of metrics.jsonl; those without a loss are passed over.
        over: what the curves are drawn over, a key of ``OVER``.
        target: of error control, a cosine, or a convergence factor where those were measured; 0: not drawn.

    Raises:
        UserError: a run has not recorded what the curves are to be drawn over, or matplotlib is missing.
    """
    runs = {label: with_place(label, lines, over) for label, lines in runs.items()}
    checked = {label: checks(lines) for label, lines in runs.items()}
    kinds = {check.kind for points in checked.values() for check in points}
    names = ["loss", *_measures(runs), *(kind for kind in _CHECKS if kind in kinds)]
    figure = new_figure(9, 2.5 + 2 * len(names))
    ratios = [2] + [1] * (len(names) - 1)
    panels = figure.subplots(len(names), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    below = dict(zip(names[1:], panels[1:], strict=True))
    for number, (label, lines) in enumerate(runs.items()):
        color = f"C{number % 10}"
        _draw_losses(panels[0], label, lines, color)
        for name, panel in below.items():
            if name in _CHECKS:
                _draw_checks(panel, [c for c in checked[label] if c.kind == name], color)
            elif points := _measured(lines, name):
                panel.plot(*zip(*points, strict=True), "o-", color=color, markersize=3)
    panels[0].set(ylabel="cross-entropy (nats)")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    for name, panel in below.items():
        panel.set(ylabel=_CHECKS.get(name, name.removeprefix("val_")))
        if name in _CHECKS:
            panel.set_yscale("log")
            panel.set_title(_FILLED, fontsize=7, loc="right")
            if target:
                panel.axhline(1 - target if name == "cosine" else target, color="gray", linestyle="--", linewidth=0.8)
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[-1].set(xlabel=OVER[over])
    return png(figure)


def _draw_losses(axes: Axes, label: str, lines: Sequence[Mapping[str, Any]], color: str) -> None:
    fine = [line for line in lines if "loss" in line and line.get("network", "fine") == "fine"]
    places, losses = [line["place"] for line in fine], [line["loss"] for line in fine]
    axes.plot(places, losses, ".", color=color, alpha=0.25, markersize=2)
    axes.plot(places, _smoothed(losses, places), color=color, label=f"{label}: training, running mean")
    if held_out := _measured(lines, "val_loss"):
        axes.plot(*zip(*held_out, strict=True), "o--", color=color, markersize=4, label=f"{label}: held out")
    for place, mode in _changes(lines):
        axes.axvline(place, color=color, linestyle=":", linewidth=0.8)
        at = axes.get_xaxis_transform()
        axes.text(place, 1.01, mode, transform=at, color=color, fontsize=6, rotation=20, ha="left", va="bottom")


def _draw_checks(axes: Axes, points: Sequence[Check], color: str) -> None:
    heights = [max(1 - p.value, _SMALLEST) if p.kind == "cosine" else max(p.value, _SMALLEST) for p in points]
    axes.plot([p.place for p in points], heights, color=color, linewidth=0.8)
    for estimated in (False, True):
        some = [(p.place, height) for p, height in zip(points, heights, strict=True) if p.estimated == estimated]
        if some:
            face = "white" if estimated else color
            axes.plot(*zip(*some, strict=True), "o", color=color, markerfacecolor=face, markersize=4)


def with_place(label: str, lines: Sequence[Mapping[str, Any]], over: str) -> list[dict[str, Any]]:
    """The lines of steps, each with its place on the axis. What a run's progress is counted in stands for tokens."""
    placed, seconds, unit = [], 0.0, "tokens"
    for line in lines:
        unit = line.get("unit", unit)
        key = {"steps": "step", "flops-all": "flops_all", "tokens": unit}.get(over, over)
        seconds += line.get("seconds", 0.0)
        if over == "seconds":
            placed.append({**line, "place": seconds})
        elif key in line:
            placed.append({**line, "place": line[key]})
        elif "loss" in line:
            raise UserError(f"{label}: step {line.get('step')} has no {key!r}, which the curves are to be drawn over")
    return placed


def _measures(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What was measured in validation besides the loss, in the order in which it comes."""
    names = (name for lines in runs.values() for line in lines for name in line if name.startswith("val_"))
    return [name for name in dict.fromkeys(names) if name != "val_loss"]


def _measured(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["place"], line[name]) for line in lines if line.get(name) is not None]


def _changes(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """Steps from which other options of the solver hold, with those."""
    before = None
    for line in lines:
        if "loss" in line:
            if before is not None and line.get("mode", before) != before:
                yield line["place"], line["mode"]
            before = line.get("mode", before)


class Check(NamedTuple):
    """What a check of error control measured of the options in use."""

    place: float
    value: float  # the gradient's cosine, or the larger convergence factor
    kind: str  # which of them: "cosine" or "factor"
    estimated: bool  # against one more iteration, and not against the exact sweep


def checks(lines: Sequence[Mapping[str, Any]]) -> list[Check]:
    """The figure that each check decided by, which is the one in the log and in metrics.jsonl."""
    points = []
    for line in lines:
        measured = line.get("control", {}).get("measured") or {}
        factors = [f for f in measured.get("convergence_factor", {}).values() if f is not None]
        value, kind = measured.get("cosine"), "cosine"
        if value is None and factors:
            value, kind = max(factors), "factor"
        if value is not None:
            points.append(Check(line["place"], value, kind, measured.get("reference", "") not in ("", "exact")))
    return points


def _smoothed(values: Sequence[float], places: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start; what lies far back on the axis counts less."""
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    usual = statistics.median(gaps) if gaps else 1.0
    smoothed, average, total = [], 0.0, 0.0
    for value, gap in zip(values, [usual, *gaps], strict=True):
        kept = weight ** (gap / usual) if usual > 0 else weight
        average, total = kept * average + (1 - kept) * value, kept * total + 1 - kept
        smoothed.append(average / total)
    return smoothed
