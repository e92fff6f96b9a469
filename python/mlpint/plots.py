"""Loss curves as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

OVER = {
    "steps": "optimiser step",
    "flops": "training FLOPs of the blocks",
    "flops-all": "training FLOPs",
    "tokens": "tokens",
    "seconds": "seconds of training",
}


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, over: str = "steps") -> None:
    """Draws training loss (faint where it is noisy) and validation loss.

    Where the solver's options change, a dotted line names the new ones. Runs with error control get a second picture
    below, of what the checks measured. Of multilevel training the training loss is the fine network's.

    Args:
        runs: by label, lines of metrics.jsonl; those without a loss are passed over.
        path: of the PNG.
        over: what the curves are drawn over, a key of ``OVER``.

    Raises:
        UserError: a run has not recorded what the curves are to be drawn over.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = {label: with_place(label, lines, over) for label, lines in runs.items()}
    checks = {label: _checks(lines) for label, lines in runs.items()}
    watched = any(checks.values())
    figure = Figure(figsize=(8, 7 if watched else 5), layout="constrained")
    axes = figure.add_subplot(3, 1, (1, 2)) if watched else figure.add_subplot()
    below = figure.add_subplot(3, 1, 3, sharex=axes) if watched else None
    for number, (label, lines) in enumerate(runs.items()):
        color = f"C{number % 10}"
        fine = [line for line in lines if "loss" in line and line.get("network", "fine") == "fine"]
        steps, losses = [line["place"] for line in fine], [line["loss"] for line in fine]
        axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, _smoothed(losses, steps), color=color, label=f"{label}: training")
        held_out = [(line["place"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o--", color=color, markersize=4, label=f"{label}: validation")
        for step, mode in _changes(lines):
            axes.axvline(step, color=color, linestyle=":", linewidth=0.8)
            place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "top"}
            axes.text(step, 0.98, mode, color=color, fontsize=7, **place)
        if checks[label]:
            below.plot(*zip(*checks[label], strict=True), "o-", color=color, markersize=3, label=label)
    axes.set(xlabel=OVER[over], ylabel="cross-entropy (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    if below is not None:
        below.set(xlabel=OVER[over], ylabel="gradient cosine, or\nconvergence factor")
        below.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def with_place(label: str, lines: Sequence[Mapping[str, Any]], over: str) -> list[dict[str, Any]]:
    """The lines of steps, each with its place on the axis. What a run's progress is counted in stands for tokens."""
    found, seconds, tokens = [], 0.0, "tokens"
    for line in lines:
        tokens = next((name for name in ("tokens", "images", "sentences") if name in line), tokens)
        key = {"steps": "step", "flops-all": "flops_all", "tokens": tokens}.get(over, over)
        seconds += line.get("seconds", 0.0)
        if over == "seconds":
            found.append({**line, "place": seconds})
        elif key in line:
            found.append({**line, "place": line[key]})
        elif "loss" in line:
            raise UserError(f"{label}: step {line.get('step')} has no {key!r}, which the curves are to be drawn over")
    return found


def _changes(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """Steps from which other options of the solver hold, with those."""
    before = None
    for line in lines:
        if "loss" in line:
            if before is not None and line.get("mode", before) != before:
                yield line["place"], line["mode"]
            before = line.get("mode", before)


def _checks(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """What error control measured for the options in use: the gradient's cosine, or the larger convergence factor."""
    found = []
    for line in lines:
        measured = line.get("control", {}).get("measured") or {}
        factors = [f for f in measured.get("convergence_factor", {}).values() if f is not None]
        value = measured.get("cosine")
        if value is None and factors:
            value = max(factors)
        if value is not None:
            found.append((line["place"], value))
    return found


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
