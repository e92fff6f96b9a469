"""``mlpint bench --suite figures``: the figures that the kernels are meant to reach on an H200, in one table.

On a GPU the clock is that of graph replays from a cold L2 cache; the ratio from a warm one stands beside it. On a CPU
(``--device cpu --small``) the same code runs at small sizes with the torch paths: that shows that it works, no more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from .. import MGRIT, LayerParallel, capture
from ..errors import UserError
from ..nn import Block, BlockStack, differentiable
from ..nn.settings import Weights
from ..nn.step_context import StepContext
from . import providers, timing
from .accuracy import Judge
from .block import BlockCase
from .cases import FORWARD, Case
from .operations import Average
from .results import About, device_name
from .roofline import measure
from .shapes import Shape
from .suite import BLOCK, CASES, LLAMA_BLOCK
from .timing import Call, Effort


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name, shape: what was timed.
        against: the baseline.
        target: the ratio to reach.
        reached: the ratio, from a cold cache where there is a GPU.
        warm: the ratio from a warm cache; the same on a CPU.
        ours_ms, baseline_ms: the medians.
        note: which path ours took, or why it could not be timed.
    """

    name: str
    shape: str
    against: str
    target: float
    reached: float
    warm: float
    ours_ms: float
    baseline_ms: float
    note: str


@dataclass
class Clock:
    """Median milliseconds of a call, from a cold and from a warm cache."""

    device: torch.device
    effort: Effort

    def __call__(self, build: Callable[[], Call]) -> tuple[float, float]:
        if self.device.type != "cuda":
            median = 1e3 * statistics.median(timing.host_wall(build(), self.device, self.effort))
            return median, median
        return self.replays(timing.Graph(build, self.device))

    def replays(self, graph: Call) -> tuple[float, float]:
        """The same of what is captured already."""
        cold = timing.replays(graph, self.effort, timing.Flush(self.device))
        warm = timing.replays(graph, self.effort, None)
        return 1e3 * statistics.median(cold), 1e3 * statistics.median(warm)


@dataclass(frozen=True)
class Sizes:
    """What is timed: (d, batch, target) of single blocks, (d, batch, target) of J at once, and the others' sizes."""

    sequence: int
    blocks: tuple[tuple[int, int, float], ...]
    batched: tuple[tuple[int, int, float], ...]
    llama: tuple[tuple[int, int, int, float], ...]  # (d, batch, J, target) of Llama's blocks
    j: int
    layers: int
    step_d: int
    cfactors: tuple[int, ...]
    average_d: int
    average_j: int
    dtype: torch.dtype


H200 = Sizes(
    sequence=256,
    blocks=((128, 32, 0.98), (256, 32, 1.3), (512, 32, 1.2), (1024, 32, 1.1), (2048, 32, 0.98), (4096, 32, 0.98)),
    batched=((256, 1, 8.0), (512, 2, 3.0), (1024, 4, 1.3)),
    llama=((256, 32, 1, 1.2), (1024, 32, 1, 1.0), (256, 1, 16, 8.0), (1024, 4, 16, 1.2)),
    j=16,
    layers=128,
    step_d=256,
    cfactors=(4, 8, 16),
    average_d=1024,
    average_j=32,
    dtype=torch.bfloat16,
)
SMALL = Sizes(
    sequence=16,
    blocks=((32, 2, 0.98), (64, 2, 1.3)),
    batched=((32, 1, 8.0), (64, 2, 3.0)),
    llama=((64, 2, 1, 1.2), (64, 1, 4, 8.0)),
    j=4,
    layers=16,
    step_d=32,
    cfactors=(4,),
    average_d=64,
    average_j=4,
    dtype=torch.float32,
)


def run(device: torch.device, small: bool, out: Path, seconds: float | None) -> None:
    """Prints the table and writes it to ``figures.csv``.

    Raises:
        UserError: a CPU at full size.
    """
    if device.type == "cpu" and not small:
        raise UserError("--suite figures at full size needs a GPU; add --small to try it on a CPU")
    clock = Clock(device, Effort(seconds or (0.02 if small else 0.3), 5, 500))
    about = About(device_name(device))
    print(f"{about.gpu_name}, torch {about.torch_version}, triton {about.triton_version}, commit {about.commit or '-'}")
    lines = []
    print(_HEADER)
    for figure in figures(clock, SMALL if small else H200):
        lines.append(figure)
        print(_line(figure), flush=True)
    _write(out / "figures.csv", lines, about)
    if device.type == "cpu":
        print("on a CPU: sizes and paths are not those of the targets, this shows only that the suite runs")
    print(f"written: {out / 'figures.csv'}")


def tuned_shapes(kernel: str) -> Iterator[Shape]:
    """The shapes of one kernel that the figures time: what ``mlpint tune --suite figures`` tunes."""
    s = H200
    if kernel == "average":
        yield Shape(s.average_d, 1, 1, s.average_j, "causal", torch.float32)
        return
    for d, batch, _ in s.blocks:
        yield Shape(d, batch, s.sequence, 1, "causal", s.dtype)
    for d, batch, _ in s.batched:
        yield Shape(d, batch, s.sequence, s.j, "causal", s.dtype)
    for d, batch, at_once, _ in s.llama:
        yield Shape(d, batch, s.sequence, at_once, "causal", s.dtype)
    for j in (1, *(s.layers // cfactor for cfactor in s.cfactors)):
        yield Shape(s.step_d, 1, s.sequence, j, "causal", s.dtype)


def figures(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """All of them, one after the other. One that fails is a line with its error and does not stop the others."""
    j, t, dtype = sizes.j, sizes.sequence, sizes.dtype
    for d, batch, target in sizes.blocks:
        yield _block(clock, f"block forward, d {d}", Shape(d, batch, t, 1, "causal", dtype), target)
    for d, batch, target in sizes.batched:
        yield _block(clock, f"{j} intervals at once, d {d}", Shape(d, batch, t, j, "causal", dtype), target)
    for d, batch, at_once, target in sizes.llama:
        name = f"Llama's block forward, d {d}" if at_once == 1 else f"{at_once} of Llama's at once, d {d}"
        yield _block(clock, name, Shape(d, batch, t, at_once, "causal", dtype), target, LLAMA_BLOCK)
    yield from _steps(clock, sizes)
    yield from _averages(clock, sizes)


# --- blocks ----------------------------------------------------------------------------------------------------------


def _block(clock: Clock, name: str, shape: Shape, target: float, case: BlockCase = BLOCK) -> Figure:
    cuda = clock.device.type == "cuda"
    baseline = providers.COMPILE_GRAPH if cuda else providers.EAGER
    serial = f"{shape.j} serial steps, " if shape.j > 1 else ""
    against = serial + ("compile + CUDA graph" if cuda else "eager")
    try:
        judge = Judge(case, shape, FORWARD, clock.device)
        slow = _timed(clock, case, shape, baseline, judge)
        fast = _timed(clock, case, shape, providers.OURS, judge)
    except Exception as error:
        return _failure(name, str(shape), against, target, error)
    finally:
        torch.compiler.reset()
    return _figure(name, str(shape), against, target, slow, fast, _paths(shape, clock.device, case))


def _timed(clock: Clock, case: Case, shape: Shape, provider: str, judge: Judge) -> tuple[float, float]:
    def build() -> Call:
        return providers.make(provider, case, shape, case.inputs(shape, clock.device), FORWARD)

    judge.check(provider, build()())
    return clock(build)


def _paths(shape: Shape, device: torch.device, case: BlockCase = BLOCK) -> str:
    """The kernels that dispatch chooses for a block's operations."""
    taken = []
    for name in case.operations:
        if providers.takes_kernel(CASES[name], shape, device, FORWARD):
            taken.append(name)
    return f"triton: {', '.join(taken)}" if taken else "torch path"


# --- the whole step --------------------------------------------------------------------------------------------------


class _Serial(nn.Module):
    """The same blocks one after the other, with parameters of their own each: the usual network."""

    def __init__(self, stack: BlockStack, compiled: bool) -> None:
        super().__init__()
        self.blocks = stack.to_blocks()

        def step(w: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
            return differentiable.step(StepContext.plain(stack.settings, *x.shape[:2]), Weights(*w), x)

        self.step = torch.compile(step, dynamic=False) if compiled else step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            assert isinstance(block, Block)
            x = self.step(tuple(block.weights()), x)
        return x


def _steps(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """Forward and backward of a deep stack on one GPU, (1,1) against serial; forward and backward, all gradients."""
    n, d, t = sizes.layers, sizes.step_d, sizes.sequence
    cuda = clock.device.type == "cuda"
    shape = f"N {n}, d {d}, M {t}, {str(sizes.dtype).removeprefix('torch.')}"
    against = "serial, CUDA graph, the faster of eager and compiled" if cuda else "serial, eager"
    name = "(1,1) training step"
    torch.manual_seed(0)
    stack = BlockStack(n, d, max(1, d // 64)).to(clock.device, sizes.dtype)
    x = torch.randn(1, t, d, device=clock.device).to(sizes.dtype)
    try:
        ways = [_step(clock, _Serial(stack, compiled), x) for compiled in ((False, True) if cuda else (False,))]
        slow = min(ways)
    except Exception as error:
        yield _failure(name, shape, against, 2.0, error)
        return
    finally:
        torch.compiler.reset()
    for cfactor in sizes.cfactors:
        options = MGRIT(cfactor=cfactor, forward_iters=1, backward_iters=1)
        setting = f"{shape}, cf {cfactor}"
        try:
            fast = _step(clock, LayerParallel(stack, options), x)
        except Exception as error:
            yield _failure(name, setting, against, 2.0, error)
            continue
        block = Shape(d, 1, t, n // cfactor, "causal", sizes.dtype)
        yield _figure(name, setting, against, 2.0, slow, fast, _paths(block, clock.device))


def _step(clock: Clock, stack: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    if clock.device.type == "cuda":
        captured = capture(stack, x)
        captured(x).backward(torch.randn_like(x))  # products of zeros would be faster than those of a training step
        stack.zero_grad()
        return clock.replays(captured.replay)

    def call() -> None:
        stack(x.requires_grad_()).backward(x.detach())
        stack.zero_grad()
        x.grad = None

    return clock(lambda: call)


# --- prolongation ----------------------------------------------------------------------------------------------------


def _averages(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    shape = Shape(sizes.average_d, 1, 1, sizes.average_j, "causal", torch.float32)
    case = Average()
    description = f"d {shape.d}, {shape.j} blocks, float32"
    lerp = "torch._foreach_lerp_"
    try:
        judge = Judge(case, shape, FORWARD, clock.device)
        ours = _timed(clock, case, shape, providers.OURS, judge)
        slow = _timed(clock, case, shape, providers.BADDBMM, judge)
        bandwidth = measure(clock.device, [], small=clock.device.type == "cpu").bandwidth
    except Exception as error:
        yield _failure("prolongation", description, lerp, 1.3, error)
        return
    path = "triton" if providers.takes_kernel(case, shape, clock.device, FORWARD) else "torch path"
    copy = (1e3 * judge.traffic / bandwidth,) * 2
    yield _figure("prolongation", description, "a copy of as many bytes", 0.9, copy, ours, path)
    yield _figure("prolongation", description, lerp, 1.3, slow, ours, path)


# --- the table -------------------------------------------------------------------------------------------------------


def _figure(
    name: str, shape: str, against: str, target: float, slow: tuple[float, float], fast: tuple[float, float], note: str
) -> Figure:
    return Figure(name, shape, against, target, slow[0] / fast[0], slow[1] / fast[1], fast[0], slow[0], note)


def _failure(name: str, shape: str, against: str, target: float, error: Exception) -> Figure:
    cause = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    return Figure(name, shape, against, target, math.nan, math.nan, math.nan, math.nan, f"FAILED: {cause}")


_HEADER = f"{'figure':<28}{'target':>7}{'reached':>9}{'warm L2':>9}{'ours ms':>10}{'base ms':>10}  against; shape; path"


def _line(f: Figure) -> str:
    mark = "" if f.reached >= f.target else "  <"
    return (
        f"{f.name:<28}{f.target:>7.2f}{f.reached:>9.2f}{f.warm:>9.2f}{f.ours_ms:>10.4g}{f.baseline_ms:>10.4g}  "
        f"{f.against}; {f.shape}; {f.note}{mark}"
    )


def _write(path: Path, lines: list[Figure], about: About) -> None:
    import csv

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for cls in (Figure, About) for f in fields(cls)])
            writer.writeheader()
            writer.writerows(asdict(f) | asdict(about) for f in lines)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
