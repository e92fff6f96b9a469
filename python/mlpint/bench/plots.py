"""Pictures of benchmark results: a panel for each kernel and mode, time over width, a line for each provider."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..training.pictures import new_figure, png
from .results import Row


def plot(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draws a PNG for each metric and dtype; returns their paths.

    The lines of one panel differ in provider; where several M, J or masks were timed, in these too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pictures: dict[tuple[str, str], dict[str, dict[str, list[Row]]]] = defaultdict(dict)
    for row in rows:
        panels = pictures[row.metric_name, row.extra["dtype"]]
        lines = panels.setdefault(f"{row.kernel_name} {row.kernel_operation_mode}", defaultdict(list))
        lines[_label(row)].append(row)
    paths = []
    for (metric, dtype), panels in pictures.items():
        columns = min(3, len(panels))
        count = -(-len(panels) // columns)
        figure = new_figure(5 * columns, 3.6 * count)
        figure.suptitle(f"{metric}, {dtype}, {rows[0].gpu_name}")
        for number, (title, lines) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(count, columns, number)
            for label, points in lines.items():
                points.sort(key=lambda row: row.x_value)
                x = [row.x_value for row in points]
                (line,) = axes.plot(x, [row.y_value_50 for row in points], "o-", markersize=3, label=label)
                low, high = ([getattr(row, f"y_value_{p}") for row in points] for p in (20, 80))
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
            axes.set(title=title, xlabel=points[0].x_label, ylabel=points[0].metric_unit, xscale="log", yscale="log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=6)
        paths.append(directory / f"{metric}_{dtype}.png")
        paths[-1].write_bytes(png(figure))
    return paths


def _label(row: Row) -> str:
    extra = row.extra
    return f"{row.kernel_provider}, M {extra['M']}, J {extra['J']}, {extra['mask']}"
