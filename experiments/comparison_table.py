"""The runs of comparison.py as a table, and their validation curves over each other.

    python experiments/comparison_table.py [--out docs/comparison.png] [RESULTS.jsonl]

Where there are several seeds, the table has the mean, and the mean difference from the serial run of the same seed, if
possible with the same further keys, with its smallest and largest. The speed-up is that of a forward and backward at
the end of a run, layer-parallel and exact taking turns on the same batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

# Task -> its measures, with factor and unit; differences of those without a unit are relative.
MEASURES: dict[str, list[tuple[str, float, str]]] = {
    "gpt": [("val_loss", 1, "")],
    "bert": [("val_loss", 1, "")],
    "vit": [("val_accuracy", 100, " points")],
    "tagging": [("val_loss", 1, ""), ("val_accuracy", 100, " points")],
    "translation": [("val_loss", 1, ""), ("test_bleu", 1, " BLEU")],
    "classification": [("val_loss", 1, ""), ("val_accuracy", 100, " points")],
}
Record = dict[str, Any]


def difference(value: float, reference: float, unit: str) -> float:
    """In the measure's unit, or in percent where it has none."""
    return value - reference if unit else 100 * (value / reference - 1)


def rows(task: str, records: list[Record]) -> list[str]:
    serial = {(r["seed"], r["keys"]): r for r in records if r["setting"] == "serial"}
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in records:
        groups[r["setting"], r["keys"]].append(r)
    found = []
    for (setting, keys), group in groups.items():
        cells = []
        for measure, factor, unit in MEASURES[task]:
            cell = f"{factor * statistics.mean(r[measure] for r in group):.{3 if factor == 1 and not unit else 2}f}"
            references = [serial.get((r["seed"], keys), serial.get((r["seed"], ""))) for r in group]
            gaps = [
                difference(factor * r[measure], factor * reference[measure], unit)
                for r, reference in zip(group, references, strict=True)
                if reference is not None and setting != "serial"
            ]
            if gaps:
                spread = f", {min(gaps):+.2f} to {max(gaps):+.2f}" if len(gaps) > 1 else ""
                cell += f" ({statistics.mean(gaps):+.2f}{unit or '%'}{spread})"
            cells.append(cell)
        exact = statistics.mean(r["exact_share"] for r in group)
        timed = [r["comparison"] for r in group if "comparison" in r and r["ranks"] == 2]
        speeds = [t["exact_seconds"] / t["seconds"] for t in timed]
        speed = f"{statistics.median(speeds):.2f}x" if speeds else ""
        modes = group[0]["modes"]
        way = modes[0][1] + "".join(f", {mode} from {step}" for step, mode in modes[1:])
        what = f"{setting} {keys}".strip() + (f", {len(group)} seeds" if len(group) > 1 else "")
        found.append(f"| {task} | {what} | {'; '.join(cells)} | {exact:.0%} | {speed} | {way} |")
    return found


def draw(records: list[Record], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in MEASURES if any(r["task"] == task for r in records)]
    figure, panels = plt.subplots(2, -(-len(tasks) // 2), figsize=(13, 8), squeeze=False, constrained_layout=True)
    colors = {"serial": "black", "paper": "C3", "best": "C0", "scratch": "C2"}
    for panel, task in zip(panels.flat, tasks, strict=False):
        for r in records:
            if r["task"] == task and not r["keys"]:
                label = r["setting"] if r["seed"] == 0 else None
                points = r["curves"]["val_loss"]
                panel.plot(*zip(*points, strict=True), color=colors[r["setting"]], label=label, marker=".", alpha=0.8)
        panel.set(title=task, xlabel="step", ylabel="held-out loss (nats)")
        panel.legend()
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", default="experiments/results/comparison.jsonl")
    parser.add_argument("--out", default="", help="picture of the curves")
    args = parser.parse_args()
    records = [json.loads(line) for line in Path(args.results).read_text().splitlines()]
    print("| task | setting | held-out | exact steps | speed-up on 2 ranks | what the solver did (seed 0) |")
    print("|---|---|---|---|---|---|")
    for task in MEASURES:
        for row in rows(task, [r for r in records if r["task"] == task]):
            print(row)
    if args.out:
        draw(records, Path(args.out))


if __name__ == "__main__":
    main()
