"""Draws what the experiments on gradients have written.

python experiments/plots.py            # every docs/*.png of docs/experiments.md whose results are there

"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from setting import OPERATORS

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

RESULTS, DOCS = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs"
Records = list[dict[str, Any]]


def read(name: str) -> Records:
    with open(RESULTS / f"{name}.jsonl") as file:
        return [json.loads(line) for line in file]


def curves(records: Records) -> dict[str, Records]:
    """Setting -> its records in the order of the steps; the default beta2 and seed alone."""
    found = defaultdict(list)
    for record in records:
        if record["beta2"] == 0.999 and record["seed"] == 0:
            found[record["setting"]].append(record)
    return {setting: sorted(points, key=lambda r: r["step"]) for setting, points in found.items()}


def column(points: Records, name: str) -> tuple[list[int], list[float]]:
    """Steps and values, where there is one."""
    kept = [(p["step"], p[name]) for p in points if name in p and p["step"]]
    return [step for step, _ in kept], [value for _, value in kept]


def online(name: str, target: str) -> None:
    """A row for each coarsening factor: held-out loss above the exact curve, cosine, and the larger convergence factor.

    Colours tell operators, lines iterations.
    """
    found = curves(read(name))
    exact = dict(zip(*column(found.pop("exact"), "val_loss"), strict=True))
    lines = {"1,1": "-", "2,1": "--", "2,2": ":"}
    figure, rows = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    for (loss, cosine, factor), cfactor in zip(rows, ("4", "8"), strict=True):
        for setting, points in sorted(found.items()):
            operator, iterations, cf = setting.split(":")
            if cf != cfactor:
                continue
            style = {"label": f"{operator} ({iterations})", "marker": ".", "linestyle": lines[iterations]}
            style["color"] = f"C{OPERATORS.index(operator)}"
            steps, values = column(points, "val_loss")
            loss.plot(steps, [v / exact[s] - 1 for s, v in zip(steps, values, strict=True)], **style)
            cosine.plot(*column(points, "cosine"), **style)
            worse = [p | {"rho": max(p["rho_forward"], p["rho_backward"])} for p in points]
            factor.plot(*column(worse, "rho"), **style)
        loss.axhline(0, color="black", linewidth=0.8)
        loss.set(xlabel="step", ylabel="held-out loss over the exact run's, minus 1", ylim=(-0.03, 0.15))
        loss.set_title(f"cf {cfactor}")
        cosine.set(xlabel="step", ylabel="cosine with the exact gradient", ylim=(0, 1.02))
        factor.axhline(1, color="black", linewidth=0.8)
        factor.set(xlabel="step", ylabel="convergence factor, larger of both directions", yscale="log", ylim=(0.01, 2))
    figure.legend(*rows[0][0].get_legend_handles_labels(), fontsize="small", loc="outside right")
    figure.savefig(DOCS / target, dpi=100)


def control(target: str) -> None:
    """Held-out loss of controlled runs beside the uncontrolled ones, and the share of exact steps."""
    free, held = curves(read("operators_online")), curves(read("control"))
    figure, (loss, share) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    loss.plot(*column(free["exact"], "val_loss"), color="black", label="exact")
    for i, (setting, points) in enumerate(held.items()):
        loss.plot(*column(points, "val_loss"), color=f"C{i}", marker=".", label=f"{setting}, controlled")
        if setting in free:
            loss.plot(*column(free[setting], "val_loss"), color=f"C{i}", linestyle=":", label=f"{setting}, free")
        steps, counts = column(points, "exact_steps")
        share.plot(steps, [c / s for s, c in zip(steps, counts, strict=True)], color=f"C{i}", marker=".")
    loss.set(xlabel="step", ylabel="held-out loss (nats per byte)", ylim=(2.1, 2.8))
    loss.legend(fontsize="small")
    share.set(xlabel="step", ylabel="share of exact steps so far", ylim=(0, 1))
    figure.savefig(DOCS / target, dpi=100)


def frontier(target: str) -> None:
    """1 - cosine against the counted speed-up, a panel a depth; the line joins what nothing beats in both."""
    records = read("frontier")
    depths = sorted({r["depth"] for r in records})
    markers = {"1,1": "o", "2,1": "s", "2,2": "^"}
    figure, panels = plt.subplots(1, len(depths), figsize=(4 * len(depths), 4), sharey=True, constrained_layout=True)
    for panel, depth in zip(panels, depths, strict=True):
        points = [r for r in records if r["depth"] == depth]
        for i, coarse in enumerate(OPERATORS):
            for iterations, marker in markers.items():
                of = [r for r in points if r["coarse"] == coarse and r["iterations"] == iterations]
                x, y = [r["speed_up"] for r in of], [max(1 - r["cosine"], 1e-5) for r in of]
                label = f"{coarse} ({iterations})" if panel is panels[0] else None
                panel.plot(x, y, marker, color=f"C{i}", markersize=5, label=label)
                for r, a, b in zip(of, x, y, strict=True):
                    panel.annotate(str(r["cfactor"]), (a, b), fontsize=6, xytext=(3, 2), textcoords="offset points")
        best = [r for r in points if not any(beats(other, r) for other in points)]
        best.sort(key=lambda r: r["speed_up"])
        panel.plot([r["speed_up"] for r in best], [max(1 - r["cosine"], 1e-5) for r in best], color="grey", zorder=0)
        ranks = points[0]["counted_ranks"]
        panel.set(yscale="log", xlabel=f"counted speed-up on {ranks} ranks", title=f"{depth} layers")
    panels[0].set_ylabel("1 - cosine with the exact gradient (numbers: cf)")
    figure.legend(fontsize="small", loc="outside right")
    figure.savefig(DOCS / target, dpi=100)


def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether a is no worse in both and better in one."""
    no_worse = a["speed_up"] >= b["speed_up"] and a["cosine"] >= b["cosine"]
    return no_worse and (a["speed_up"] > b["speed_up"] or a["cosine"] > b["cosine"])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    drawings = {
        "operators_online": lambda: online("operators_online", "operators_online.png"),
        "control": lambda: control("control.png"),
        "frontier": lambda: frontier("frontier.png"),
    }
    for name, draw in drawings.items():
        if (RESULTS / f"{name}.jsonl").exists():
            draw()


if __name__ == "__main__":
    main()
