"""``mlpint report``: the loss curves of several runs in one picture, and a step of each that has a trace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError
from ..training.metrics import read_lines
from ..training.plots import OVER, loss_curves
from ..training.trace_picture import TRACE, draw_trace


def add_flags(parser: Any) -> None:
    """The flags of ``mlpint report``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or its metrics.jsonl")
    parser.add_argument("--out", default="loss.png", metavar="PNG", help="the picture (default loss.png)")
    parser.add_argument(
        "--over", default="steps", metavar="WHAT", help=f"{', '.join(OVER)}: what to draw them over (default steps)"
    )


def run(options: argparse.Namespace) -> None:
    """Draws the picture.

    Raises:
        UserError: a run that cannot be read or holds no loss, or a picture that cannot be written.
    """
    if options.over not in OVER:
        raise ConfigError(f"over = {options.over!r}: must be one of {', '.join(OVER)}")
    runs = {}
    for name in options.runs:
        path = Path(name) / "metrics.jsonl" if Path(name).is_dir() else Path(name)
        runs[name] = read_lines(path)
        if not any("loss" in line for line in runs[name]):
            raise UserError(f"{path}: holds no step with a loss")
    written = [Path(options.out)]
    try:
        loss_curves(runs, written[0], options.over)
        for name in options.runs:
            if (trace := Path(name) / TRACE).exists():
                number = f"-{len(written)}" if len(written) > 1 else ""
                written.append(written[0].with_name(f"{written[0].stem}-trace{number}.png"))
                draw_trace(trace, written[-1])
    except OSError as error:
        raise UserError(f"{written[-1]}: cannot be written ({error.strerror})") from None
    print(f"written: {', '.join(map(str, written))}")
