"""Draws the pictures of README.md and docs/solver.md that are no measurements.

python docs/drawings.py  # writes docs/depth.png
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mlpint import MGRIT
from mlpint.planning.simulation import Costs, layer_parallel, pipeline

LAYERS, RANKS, CFACTOR, MICROBATCHES = 16, 4, 4, 4
PALE = 0.45
Bar = tuple[float, float, int, bool]  # begin, length, layer, whether it is of the coarse chain


def serial() -> list[Bar]:
    forward = [(float(n), 1.0, n, False) for n in range(LAYERS)]
    backward = [(LAYERS + 2.0 * i, 2.0, n, False) for i, n in enumerate(reversed(range(LAYERS)))]
    return forward + backward


def piped() -> list[Bar]:
    """GPipe: each slice of the batch follows the one before it."""
    share, bars, part = LAYERS // RANKS, [], 1 / MICROBATCHES
    turns = (MICROBATCHES + RANKS - 1) * share * part
    for m in range(MICROBATCHES):
        for n in range(LAYERS):
            rank, place = divmod(n, share)
            bars.append(((m + rank) * share * part + place * part, part, n, False))
            back, turned = RANKS - 1 - rank, share - 1 - place
            bars.append((turns + ((m + back) * share + turned) * 2 * part, 2 * part, n, False))
    return bars


def chained() -> list[Bar]:
    """(1,1) with injection. A rank goes through its interval as soon as it has sent its coarse step on."""
    intervals, bars = LAYERS // CFACTOR, []
    for i in range(intervals):
        bars += [(float(i), 1.0, CFACTOR * i, True)] if i < intervals - 1 else []
        begin = float(i + 1 if i < intervals - 1 else i)
        # The coarse step was the first layer's own.
        own = range(1, CFACTOR) if i < intervals - 1 else range(CFACTOR)
        bars += [(begin + k, 1.0, CFACTOR * i + n, False) for k, n in enumerate(own)]
    forward = max(begin + length for begin, length, _, _ in bars)
    for i, interval in enumerate(reversed(range(intervals))):
        last = CFACTOR * (interval + 1) - 1
        bars += [(forward + i, 1.0, last, True)] if interval else []
        begin = forward + (i + 1 if interval else i)
        bars += [(begin + 2.0 * k, 2.0, last - k, False) for k in range(CFACTOR)]
    return bars


def main() -> None:
    costs = Costs()
    times = {
        "one sweep, layer after layer: the ranks take turns": (serial(), 3.0 * LAYERS),
        f"pipeline: {MICROBATCHES} slices of the batch": (piped(), pipeline(LAYERS, RANKS, costs, MICROBATCHES).time),
        "layer-parallel: a short coarse chain, then all ranks at once": (
            chained(),
            layer_parallel(LAYERS, RANKS, MGRIT(2, CFACTOR, 1, 1), costs).time,
        ),
    }
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    for axes, (title, (bars, time)) in zip(figure.subplots(3, 1, sharex=True), times.items(), strict=True):
        for begin, length, layer, coarse in bars:
            colour = f"C{layer // (LAYERS // RANKS)}"
            axes.broken_barh([(begin, length)], (layer - 0.45, 0.9), facecolors=colour, alpha=PALE if coarse else 1.0)
        axes.axvline(time, color="black", linewidth=0.8)
        axes.text(time + 0.3, LAYERS - 2.2, f"{time:g}", fontsize=9)
        axes.set(ylabel="layer", ylim=(-0.7, LAYERS - 0.3), xlim=(0, 3 * LAYERS + 2))
        axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("time of a training step's forward and backward, in forwards of one layer")
    patches = [Patch(color=f"C{r}", label=f"rank {r}") for r in range(RANKS)]
    patches.append(Patch(color="gray", alpha=PALE, label="coarse chain"))
    figure.legend(handles=patches, loc="outside upper right", ncols=RANKS + 1, frameon=False, fontsize=9)
    FigureCanvasAgg(figure).print_png(Path(__file__).with_name("depth.png"))


if __name__ == "__main__":
    main()
