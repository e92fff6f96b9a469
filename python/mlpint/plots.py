"""Loss curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draws training loss (faint where it is noisy) and validation loss over steps.

    Args:
        runs: by label, lines of metrics.jsonl; those without a loss are passed over.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, lines) in enumerate(runs.items()):
        color = f"C{number % 10}"
        steps = [line["step"] for line in lines if "loss" in line]
        losses = [line["loss"] for line in lines if "loss" in line]
        axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, _smoothed(losses), color=color, label=f"{label}: training")
        held_out = [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o--", color=color, markersize=4, label=f"{label}: validation")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, average = [], 0.0
    for n, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**n))
    return smoothed
