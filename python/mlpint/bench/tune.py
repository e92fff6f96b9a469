"""``mlpint tune``: the fastest launch configuration of each kernel and shape, or that plain PyTorch is faster.

Each candidate must be as accurate as plain PyTorch before it is timed. The result is a JSON file for this device, which
:mod:`mlpint.kernels.dispatch` reads; ``mlpint bench`` and training never tune.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..kernels import dispatch, tuned_files
from ..kernels.dispatch import Choice
from ..kernels.tuned_files import Entry
from . import providers, timing
from .accuracy import Inaccurate, Judge
from .cases import FORWARD, Operation
from .results import commit, device_name, installed
from .shapes import DTYPES, Grid, Shape
from .suite import OPERATIONS

# Kernels in an order in which what the later ones are held against is tuned already; forward before backward.
KERNELS = (
    "ln_linear",
    "linear_axpy_projection",
    "linear_axpy",
    "mlp",
    "attention",
    "ln_backward",
    "gated_linear",
    "gated_backward",
    "pack_heads",
    "average",
)
GRIDS = {
    "cuda": Grid((128, 256, 512, 1024, 2048, 4096), (256, 1024, 8192), (1, 4, 16), ("causal",), ("bfloat16",), 256),
    "cpu": Grid((64,), (32,), (1, 4), ("causal",), ("float32",), 32),
}
MARGIN = 1.02  # a kernel is taken only if it is so much faster than torch


def add_flags(parser: Any) -> None:
    """The flags of ``mlpint tune``."""
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu times torch alone (default cuda)"
    )
    lists = {"kernels": KERNELS, "d": ["widths"], "m": ["rows of a layer"], "j": ["layers at once"], "dtypes": DTYPES}
    for name, texts in lists.items():
        parser.add_argument(f"--{name}", metavar="A,B", help=", ".join(texts))
    parser.add_argument("--suite", default="full", choices=("full", "figures"), help="figures: what its table times")
    parser.add_argument("--seconds", type=float, default=0.02, metavar="S", help="per candidate (default 0.02)")
    parser.add_argument(
        "--jobs", type=int, default=min(16, os.cpu_count() or 1), metavar="N",
        help="processes that compile candidates before they are timed (default: the cores, at most 16)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="JSON", help="default: where dispatch looks, $MLPINT_TUNED or the user's cache"
    )


def run(options: argparse.Namespace) -> None:
    """Tunes and writes the file after each kernel, keeping what it holds for other shapes.

    Raises:
        UserError: no GPU, flags that do not fit, or a file that cannot be used.
    """
    from .command import chosen, grid_of
    from .figures import tuned_shapes

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "mlpint tune needs an NVIDIA GPU, and torch sees none; without one mlpint takes its torch path. "
            "--device cpu tries the command itself"
        )
    device = torch.device(options.device)
    name = device_name(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    path = Path(options.out) if options.out else tuned_files.user_file(name)
    kernels = chosen(options.kernels, KERNELS, "kernels")
    grid = grid_of(options, GRIDS[device.type])
    known = _known(path, capability)
    tuner = Tuner(device, timing.Effort(options.seconds, 5, 100))
    print(f"{name}: {path}", flush=True)
    if options.jobs < 1:
        raise UserError(f"jobs = {options.jobs}: must be an integer of at least 1")
    shapes_of = {
        kernel: list(tuned_shapes(kernel) if options.suite == "figures" else grid.shapes(OPERATIONS[kernel].masked))
        for kernel in kernels
    }
    if device.type == "cuda" and options.jobs > 1:
        print(compile_ahead(tuner, shapes_of, options.jobs), flush=True)
    for kernel, shapes in shapes_of.items():
        for line in tuner.tune(OPERATIONS[kernel], shapes):
            print(line, flush=True)
        # The newer of two entries of the same shape holds.
        merged = {_identity(e): e for e in (*known, *tuner.entries)}
        _write(path, name, capability, list(merged.values()))
    dispatch.forget()
    print(f"written: {path}, {len(tuner.entries)} shapes tuned, {len(merged)} in all")


def compile_ahead(tuner: Tuner, shapes_of: dict[str, list[Shape]], jobs: int) -> str:
    """Fills Triton's cache on disk by running every candidate once, in so many processes; a line for people.

    Compiling one after the other takes most of the time of tuning. What fails here fails again when it is timed,
    and is reported then.
    """
    tasks = []
    for kernel, shapes in shapes_of.items():
        for shape, mode in tuner.untuned(OPERATIONS[kernel], shapes):
            tasks += [(kernel, shape, mode, config) for config in tuner.candidates(OPERATIONS[kernel], shape, mode)]
    # A process that has initialised CUDA must not be forked.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    started = time.perf_counter()
    try:
        with pool:
            list(pool.map(_run_once, [tuner.device] * len(tasks), tasks))
    except BrokenProcessPool:
        return "compiling ahead ended early: a process died; what is missing is compiled when it is timed"
    return f"{len(tasks)} candidates compiled by {jobs} processes in {time.perf_counter() - started:.0f} s"


def _run_once(device: torch.device, task: tuple[str, Shape, str, dict[str, int]]) -> None:
    kernel, shape, mode, config = task
    torch.set_num_threads(1)
    with suppress(Exception):
        Tuner(device, timing.Effort()).call(OPERATIONS[kernel], shape, mode, providers.TRITON, config)()


def _identity(entry: Entry) -> tuple:
    return entry.op, entry.d, entry.m, entry.j, entry.dtype


def _known(path: Path, capability: tuple[int, int]) -> list[Entry]:
    if not path.exists():
        return []
    tuned = tuned_files.load(path)
    if tuned.capability != capability:
        raise UserError(f"{path}: holds what was tuned on {tuned.device}; give another file with --out")
    return [entry for entries in tuned.entries.values() for entry in entries]


def _write(path: Path, name: str, capability: tuple[int, int], entries: Sequence[Entry]) -> None:
    about = {
        "versions": {package: installed(package) for package in ("torch", "triton", "mlpint")},
        "cuda": torch.version.cuda,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }
    try:
        tuned_files.write(path, name, capability, about, entries)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another with --out") from None


@dataclass
class Tuner:
    """Finds entries for a device.

    Args:
        device: the device to time on.
        effort: how long to time a candidate.
    """

    device: torch.device
    effort: timing.Effort
    entries: list[Entry] = field(default_factory=list)

    def tune(self, case: Operation, shapes: Iterable[Shape]) -> Iterator[str]:
        """One kernel in all its modes; lines for people on the way. What is the same to dispatch is tuned once."""
        for shape, mode in self.untuned(case, shapes):
            yield f"{case.name} {mode}: {shape}"
            entry, notes = self.best(case, shape, mode)
            yield from notes
            if entry is not None:
                self.entries.append(entry)

    def untuned(self, case: Operation, shapes: Iterable[Shape]) -> Iterator[tuple[Shape, str]]:
        """Shapes and modes that have no entry yet; of what is the same to dispatch, the first."""
        done = {_identity(entry) for entry in self.entries}
        for shape in shapes:
            dtype = str(shape.dtype).removeprefix("torch.")
            for mode in (m for m in case.modes if m != "full"):
                key = case.key(shape, mode)
                identity = (key.op, key.d, key.m, key.j, dtype)
                if identity not in done:
                    done.add(identity)
                    yield shape, mode

    def best(self, case: Operation, shape: Shape, mode: str) -> tuple[Entry | None, list[str]]:
        """The entry of one shape, and lines for people about it."""
        key = case.key(shape, mode)
        notes: list[str] = []
        try:
            judge = Judge(case, shape, mode, self.device)
            times = {"torch": self._time(case, shape, mode, judge, providers.BADDBMM, None)}
        except (RuntimeError, Inaccurate) as error:
            return None, [f"  left out: {_first_line(error)}"]
        fastest = None
        for config in self.candidates(case, shape, mode):
            try:
                time = self._time(case, shape, mode, judge, providers.TRITON, config)
            except Exception as error:  # a configuration may ask for more than the GPU has, or hit the compiler's bugs
                notes.append(f"  {config}: {_first_line(error)}")
                continue
            if time < times.get("triton", float("inf")):
                times["triton"], fastest = time, config
        path = "triton" if times.get("triton", float("inf")) * MARGIN < times["torch"] else "torch"
        dtype = str(shape.dtype).removeprefix("torch.")
        entry = Entry(
            key.op, key.d, key.m, key.j, dtype, path, fastest if path == "triton" else None,
            {name: round(1e6 * time, 3) for name, time in times.items()},
        )  # fmt: skip
        times_text = ", ".join(f"{name} {us:.1f} us" for name, us in entry.microseconds.items())
        return entry, [*notes, f"  {path}: {times_text}" + (f" with {fastest}" if fastest else "")]

    def candidates(self, case: Operation, shape: Shape, mode: str) -> list[dict[str, int]]:
        """Launch configurations to be tried; none where no kernel runs."""
        if providers.left_out(providers.TRITON, self.device):
            return []
        return case.configs(shape, mode)

    def _time(
        self, case: Operation, shape: Shape, mode: str, judge: Judge, provider: str, config: dict[str, int] | None
    ) -> float:
        """Median seconds of a graph's replays from a cold cache; on a CPU, of calls. Checks accuracy first."""

        def build() -> timing.Call:
            return self.call(case, shape, mode, provider, config)

        call = build()
        judge.check(provider, call())
        if self.device.type != "cuda":
            return statistics.median(timing.host_wall(call, self.device, self.effort))
        graph = timing.Graph(build, self.device)
        return statistics.median(timing.replays(graph, self.effort, timing.Flush(self.device)))

    def call(
        self, case: Operation, shape: Shape, mode: str, provider: str, config: dict[str, int] | None
    ) -> Callable[[], object]:
        """The call that is timed: one provider's, on inputs of its own."""
        inputs = case.inputs(shape, self.device)
        if provider == providers.TRITON:
            op = case.key(shape, mode).op
            choices = {op: Choice("triton", config, "it is being tuned")}
            with dispatch.forced(choices):
                inner = case.kernel(inputs, mode)
        else:
            choices = self._rivals(case, shape)
            with dispatch.forced(choices):
                inner = case.batched(inputs, mode)

        def call() -> object:
            with dispatch.forced(choices):
                return inner()

        return call

    def _rivals(self, case: Operation, shape: Shape) -> dict[str, Choice]:
        """The choices for the torch path of a case: torch, but for the one-kernel MLP the kernels it stands for."""
        plain = {op: Choice("torch", None, "it is being tuned") for op in dispatch.OPERATIONS}
        if case.name != "mlp":
            return plain
        for name in ("ln_linear", "linear_axpy"):
            key = OPERATIONS[name].key(shape, FORWARD)
            for entry in self.entries:
                if entry.op == key.op and entry.distance(key.d, key.m, key.j) == 0:
                    plain[key.op] = Choice(entry.path, entry.config, "tuned before")
        return plain


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
