"""Draws what section 14 of docs/experiments.md says of multilevel training.

    python experiments/multilevel_figures.py --out docs/multilevel_questions.png

One coarse network or two, over delta, with SGD; gradient norms by layer; growing from one layer; the paper's own size.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


def read(name: str) -> list[Record]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def coarse_networks(axis: Any, ends: list[Record]) -> None:
    losses: dict[tuple[bool, float], list[float]] = defaultdict(list)
    for r in ends:
        if r["method"] == "multilevel":
            losses["single" in r["options"], r["options"]["delta"]].append(r["val_loss"])
    for single, name in ((False, "A and B"), (True, "only A")):
        points = sorted((delta, values) for (kind, delta), values in losses.items() if kind == single)
        middle = [statistics.mean(values) for _, values in points]
        spread = [(max(values) - min(values)) / 2 for _, values in points]
        axis.errorbar([delta for delta, _ in points], middle, spread, marker="o", label=name)
    for budget, style in ((1.0, "-"), (0.6, ":")):
        plain = [r["val_loss"] for r in ends if r["method"] == "plain" and r["budget"] == budget]
        axis.axhline(statistics.mean(plain), color="gray", linestyle=style, label=f"plain, budget {budget:g}")
    axis.set(title="SGD: one coarse network or two (budget .6)", xlabel="delta", ylabel="held-out loss")


def gradient_norms(axis: Any, ends: list[Record]) -> None:
    for name, wanted in (("plain", None), ("A and B, delta .25", False), ("only A, delta .25", True)):
        found = [
            r["gradient_norms"]
            for r in ends
            if (r["method"] == "plain" and r["budget"] == 1 and wanted is None)
            or (r["options"].get("delta") == 0.25 and ("single" in r["options"]) is wanted)
        ]
        axis.plot(range(1, 13), [statistics.mean(norms) for norms in zip(*found, strict=True)], marker="o", label=name)
    axis.set(title="SGD: gradient norms at the end", xlabel="layer", ylabel="norm", yscale="log")


def curves(axis: Any, records: list[Record], named: dict[str, Any], flops: str, scale: float) -> None:
    for name, picked in named.items():
        points = sorted((r[flops] / scale, r["val_loss"]) for r in records if picked(r) and r["steps"])
        axis.plot(*zip(*points, strict=True), marker=".", label=name)
    axis.set(ylabel="held-out loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/multilevel_questions.png"))
    args = parser.parse_args()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    ends = [r for r in read("multilevel_sgd") if r["end"]]
    coarse_networks(axes[0, 0], ends)
    gradient_norms(axes[0, 1], ends)
    grown = [r for r in read("multilevel_grow") if r["seed"] == 0 and r["lr"] == 0.003]
    named = {
        "12 layers": lambda r: r["method"] == "plain" and r["layers"] == 12,
        "grown from 1 layer": lambda r: (
            r["options"].get("coarse_steps") == 2160
            and (r["options"]["networks"], r["options"].get("neighbours"), r["options"]["step_size"])
            == (12, "average", "unit")
        ),
        "6 layers": lambda r: r["method"] == "shallow",
        "3 layers": lambda r: r["layers"] == 3,
        "1 layer": lambda r: r["layers"] == 1,
    }
    curves(axes[1, 0], grown, named, "flops", 1e12)
    axes[1, 0].set(title="AdamW, WSD: growing", xlabel="10^12 FLOPs of the blocks", ylim=(1.8, 2.8))
    paper = read("multilevel_paper")
    named = {"plain": lambda r: r["method"] == "plain", "multilevel": lambda r: r["method"] == "multilevel"}
    curves(axes[1, 1], paper, {f"{name}, blocks": pick for name, pick in named.items()}, "flops", 1e12)
    curves(axes[1, 1], paper, {f"{name}, all": pick for name, pick in named.items()}, "all_flops", 1e12)
    axes[1, 1].set(title="d 256, 50,257 tokens, SGD", xlabel="10^12 FLOPs", ylim=(6.9, 8.5))
    for axis in axes.flat:
        axis.legend(fontsize=8)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
