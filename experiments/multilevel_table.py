"""What the runs of multilevel.py come to: loss, and the FLOPs saved against the deep network trained plainly.

    python experiments/multilevel_table.py [--out docs/multilevel.png] [RESULTS.jsonl]

The saving of a run is 1 - (its blocks' FLOPs) / (the FLOPs at which plain training ends at the same loss). The latter
are read off plain runs of the same optimiser, data, depth and seed, each with its whole learning rate schedule, at the
best of their learning rates for each budget, by interpolation of the loss over log FLOPs; beyond the plain runs there
is only a bound.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def setting(record: Record) -> tuple:
    return tuple(record[name] for name in ("data", "optimizer", "layers", "dim", "seed", "warmup"))


def name_of(record: Record) -> str:
    extra = {name: record[name] for name in ("share", "grow") if record["method"] == "stack"}
    extra |= {k: v for k, v in record["options"].items()}
    return record["method"] + "".join(f" {name}={value}" for name, value in extra.items())


def plain_curve(records: list[Record]) -> list[tuple[float, float]]:
    """(log FLOPs, best loss) of plain runs by budget, ascending."""
    best: dict[float, tuple[float, float]] = {}
    for r in records:
        if r["method"] == "plain":
            point = math.log(r["flops"]), r["val_loss"]
            best[r["budget"]] = min(best.get(r["budget"], point), point, key=lambda p: p[1])
    return sorted(best.values())


def saving(record: Record, curve: list[tuple[float, float]]) -> str:
    loss, spent = record["val_loss"], record["flops"]
    for (a, high), (b, low) in zip(curve, curve[1:], strict=False):
        if low <= loss <= high:
            same = math.exp(a + (b - a) * (high - loss) / (high - low))
            return f"{100 * (1 - spent / same):+.0f}%"
    if not curve:
        return "?"
    edge, sign = (curve[-1], ">") if loss < curve[-1][1] else (curve[0], "<")
    return f"{sign}{100 * (1 - spent / math.exp(edge[0])):+.0f}%"


def draw(records: list[Record], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        label = f"{name_of(r)} lr={r['lr']:g} x{r['budget']:g}"
        if r["seed"] == 0:
            groups[r["data"], r["optimizer"]][label].append(r)
    figure, axes = plt.subplots(1, len(groups), figsize=(7 * len(groups), 5), squeeze=False)
    for axis, ((data, optimizer), runs) in zip(axes[0], sorted(groups.items()), strict=True):
        for label, points in runs.items():
            points = [p for p in points if p["val_loss"] < 3]
            style = "k-" if label.startswith("plain") else "-"
            axis.plot([p["flops"] for p in points], [p["val_loss"] for p in points], style, lw=1, label=label)
        axis.set(title=f"{data}, {optimizer}", xlabel="training FLOPs of the blocks", ylabel="loss on held-out text")
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", default="experiments/results/multilevel.jsonl")
    parser.add_argument("--out", help="draw the curves into this picture")
    args = parser.parse_args()
    records = [json.loads(line) for line in Path(args.results).read_text().splitlines()]
    ends: dict[tuple, list[Record]] = defaultdict(list)
    for r in records:
        if r["end"]:
            ends[setting(r)].append(r)
    for group, runs in sorted(ends.items(), key=str):
        print("data {}, {}, {} layers, d {}, seed {}, warm-up {}".format(*group))
        curve = plain_curve(runs)
        for r in sorted(runs, key=lambda r: (r["method"] != "plain", r["budget"], r["val_loss"])):
            cells = f"lr {r['lr']:<6g} budget {r['budget']:<5g} loss {r['val_loss']:.4f}  saving {saving(r, curve):>6}"
            cells += f"  accuracy {r['accuracy']:.3f}, with noise {r['noisy_accuracy']:.3f}"
            cells += f"  cosine (1,1) cf 4 {r['cosine_11_cf4']:.2f}"
            print(f"  {cells}  {name_of(r)}")
    if args.out:
        draw(records, Path(args.out))


if __name__ == "__main__":
    main()
