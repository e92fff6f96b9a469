"""Draws the results of operators_online.py: held-out loss and gradient cosine over the steps.

    python experiments/plot_operators.py experiments/results/operators_online.jsonl docs/operators_online.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def main(source: str, target: str) -> None:
    curves = defaultdict(list)
    with open(source) as file:
        for line in file:
            record = json.loads(line)
            curves[record["setting"]].append((record["step"], record["val_loss"], record["cosine"]))
    figure, (loss, cosine) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for setting, points in curves.items():
        steps, losses, cosines = zip(*sorted(points), strict=True)
        loss.plot(steps, losses, label=setting, marker=".")
        cosine.plot(steps, cosines, marker=".")
    loss.set(xlabel="step", ylabel="held-out loss (nats per byte)", ylim=(2.1, 3.1))
    cosine.set(xlabel="step", ylabel="cosine with the exact gradient", ylim=(0, 1.02))
    loss.legend(title="operator:iterations:cf")
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
