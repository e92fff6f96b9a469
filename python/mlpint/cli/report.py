"""``mlpint report``: one HTML page, or one picture, of one run or of several over each other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError
from ..training.html_report import report_page
from ..training.metrics import read_lines
from ..training.plots import OVER, loss_curves
from ..training.trace_picture import TRACE, Step, draw_step, last_step


def add_flags(parser: Any) -> None:
    """The flags of ``mlpint report``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or its metrics.jsonl")
    parser.add_argument(
        "--out",
        default="report.html",
        metavar="FILE",
        help="a page that needs no other file (.html), or the curves alone, and a step of each trace (.png) (default "
        "report.html)",
    )
    parser.add_argument(
        "--over", default="steps", metavar="WHAT", help=f"{', '.join(OVER)}: what to draw them over (default steps)"
    )


def run(options: argparse.Namespace) -> None:
    """Writes the page or the pictures.

    Raises:
        UserError: a run that cannot be read or holds no loss, or a file that cannot be written.
    """
    if options.over not in OVER:
        raise ConfigError(f"over = {options.over!r}: must be one of {', '.join(OVER)}")
    out = Path(options.out)
    if out.suffix not in (".html", ".png"):
        raise ConfigError(f"out = {options.out!r}: must end in .html or .png")
    runs: dict[str, list[dict[str, Any]]] = {}
    traced: dict[str, tuple[Step, bytes]] = {}
    for name in options.runs:
        path = Path(name) / "metrics.jsonl" if Path(name).is_dir() else Path(name)
        runs[name] = read_lines(path)
        if not any("loss" in line for line in runs[name]):
            raise UserError(f"{path}: holds no step with a loss")
        if (trace := Path(name) / TRACE).exists():
            step = last_step(trace)
            traced[name] = step, draw_step(step)
    written = [out]
    try:
        if out.suffix == ".html":
            out.write_text(report_page(runs, traced, options.over), encoding="utf-8")
        else:
            out.write_bytes(loss_curves(runs, options.over))
            for _, picture in traced.values():
                number = f"-{len(written)}" if len(written) > 1 else ""
                written.append(out.with_name(f"{out.stem}-trace{number}.png"))
                written[-1].write_bytes(picture)
    except OSError as error:
        raise UserError(f"{written[-1]}: cannot be written ({error.strerror})") from None
    print(f"written: {', '.join(map(str, written))}")
