"""``mlpint report``: one HTML page, or one picture, of one run or of several over each other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError
from ..training.html_report import report_page
from ..training.metrics import read_lines
from ..training.plots import OVER, loss_curves
from ..training.trace_picture import TRACE, draw_trace


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
    runs, directories = {}, {}
    for name in options.runs:
        path = Path(name) / "metrics.jsonl" if Path(name).is_dir() else Path(name)
        runs[name] = read_lines(path)
        if not any("loss" in line for line in runs[name]):
            raise UserError(f"{path}: holds no step with a loss")
        if Path(name).is_dir():
            directories[name] = Path(name)
    written = [out]
    try:
        if out.suffix == ".html":
            out.write_text(report_page(runs, directories, options.over), encoding="utf-8")
        else:
            loss_curves(runs, out, options.over)
            for directory in directories.values():
                if (trace := directory / TRACE).exists():
                    number = f"-{len(written)}" if len(written) > 1 else ""
                    written.append(out.with_name(f"{out.stem}-trace{number}.png"))
                    draw_trace(trace, written[-1])
    except OSError as error:
        raise UserError(f"{written[-1]}: cannot be written ({error.strerror})") from None
    print(f"written: {', '.join(map(str, written))}")
