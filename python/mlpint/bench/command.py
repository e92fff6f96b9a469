"""What ``mlpint bench`` does with its flags."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from . import providers, shapes
from .cases import BACKWARD, FORWARD, FULL
from .plots import plot
from .results import About, device_name, write_rows
from .roofline import measure
from .suite import CASES, Suite
from .timing import Effort

MODES = (FORWARD, BACKWARD, FULL)
_GRID = ("d", "m", "j")


def add_flags(parser: Any) -> None:
    """The flags of ``mlpint bench``."""
    parser.add_argument("--suite", default="quick", choices=("quick", "full", "figures"), help="default quick")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default auto")
    parser.add_argument("--small", action="store_true", help="sizes of --suite figures that a CPU gets through")
    lists = {
        "kernels": ", ".join(CASES),
        "providers": "; ".join(f"{name}: {text}" for name, text in providers.ALL.items()),
        "modes": ", ".join(MODES),
        "d": "widths",
        "m": "rows of a layer",
        "j": "layers at once",
        "masks": ", ".join(shapes.MASKS),
        "dtypes": ", ".join(shapes.DTYPES),
    }
    for name, text in lists.items():
        parser.add_argument(f"--{name}", metavar="A,B", help=text)
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens; M = batch x sequence")
    parser.add_argument("--seconds", type=float, default=None, metavar="S", help="per timing (default 0.2; quick 0.05)")
    parser.add_argument("--out", default="bench", metavar="DIR", help="CSV file and plots (default bench)")


def run(options: argparse.Namespace) -> None:
    """Runs the benchmark, prints as it goes and writes ``bench.csv`` and the plots.

    Raises:
        UserError: flags that do not fit.
    """
    device = device_of(options.device)
    if options.suite == "figures":
        from .figures import run as run_figures

        run_figures(device, options.small, Path(options.out), options.seconds)
        return
    grid = grid_of(options, getattr(shapes, f"{device.type}_{options.suite}".upper()))
    wanted = _providers(options, device)
    suite = Suite(
        device,
        chosen(options.kernels, tuple(CASES), "kernels"),
        wanted,
        chosen(options.modes, MODES, "modes"),
        grid,
        measure(device, [shapes.DTYPES[name] for name in grid.dtypes], small=device.type == "cpu"),
        About(device_name(device)),
        Effort(options.seconds or (0.05 if options.suite == "quick" else 0.2)),
        deadline=90.0 if options.suite == "quick" and device.type == "cpu" else None,
    )
    print(f"{suite.about.gpu_name}, torch {torch.__version__}, commit {suite.about.commit or 'unknown'}")
    print(suite.roofline)
    for line in suite.run():
        print(line, flush=True)
    _finish(suite, Path(options.out))


def device_of(name: str) -> torch.device:
    """The device that a flag names.

    Raises:
        UserError: cuda, where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda': torch sees no GPU; must be auto or cpu here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def grid_of(options: argparse.Namespace, grid: shapes.Grid) -> shapes.Grid:
    """The grid with what flags give in place of its own."""
    changes: dict[str, Any] = {}
    for name in (*_GRID, "masks", "dtypes"):
        text = getattr(options, name, None)
        if text is not None:
            changes[name] = tuple(_integer(name, v) if name in _GRID else v for v in text.split(","))
    if getattr(options, "sequence", None) is not None:
        changes["sequence"] = options.sequence
    return dataclasses.replace(grid, **changes)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} = {text!r}: must be integers separated by commas") from None


def chosen(text: str | None, allowed: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The names in a flag, checked; all without it."""
    if text is None:
        return allowed
    for value in text.split(","):
        if value not in allowed:
            raise UserError(f"{name} has {value!r}: must be of {', '.join(allowed)}")
    return tuple(text.split(","))


def _providers(options: argparse.Namespace, device: torch.device) -> list[str]:
    """Those that run; says which do not, and why."""
    wanted = chosen(options.providers, tuple(providers.ALL), "providers")
    if options.providers is None:
        wanted = providers.DEFAULT
    running = []
    for name in wanted:
        why = providers.left_out(name, device)
        if (
            name == providers.COMPILE
            and options.providers is None
            and options.suite == "quick"
            and device.type == "cpu"
        ):
            why = "compiling takes longer than a quick run on a CPU; ask for it with --providers"
        if why:
            print(f"left out: {name} ({why})")
        else:
            running.append(name)
    if not running:
        raise UserError(f"providers = {','.join(wanted)}: none of them runs on this {device.type}")
    return running


def _finish(suite: Suite, out: Path) -> None:
    if suite.skipped:
        print(f"skipped: {suite.skipped} measurements, after {suite.deadline:.0f} s; --suite full runs them all")
    for failure in suite.failures:
        print(f"FAILED: {failure}")
    if not suite.rows:
        raise UserError("nothing was timed: see the failures above")
    write_rows(out / "bench.csv", suite.rows)
    print(f"written: {out / 'bench.csv'}, " + ", ".join(map(str, plot(suite.rows, out))))
