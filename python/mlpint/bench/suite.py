"""The benchmark's loop: over cases, shapes, modes and providers; accuracy first, then the clocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from . import providers, timing
from .accuracy import Inaccurate, Judge
from .attention import Attention
from .block import BlockCase
from .cases import Case, Operation
from .operations import Average, LinearAxpy, LnBackward, LnLinear, LnLinearTrain, Mlp, Projection
from .results import About, Row
from .roofline import Roofline
from .shapes import Grid, Shape
from .timing import Effort, Timing
from .todays_block import LlamaBlockCase
from .todays_operations import GatedBackward, GatedLinear, PackHeads, RmsLinear

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        LnLinear(),
        LnLinearTrain(),
        Projection(),
        LinearAxpy(),
        Mlp(),
        Attention(),
        LnBackward(),
        RmsLinear(),
        GatedLinear(),
        GatedBackward(),
        PackHeads(),
        Average(),
    )
}
BLOCK, LLAMA_BLOCK = BlockCase(), LlamaBlockCase()
CASES: dict[str, Case] = {**OPERATIONS, BLOCK.name: BLOCK, LLAMA_BLOCK.name: LLAMA_BLOCK}


@dataclass
class Suite:
    """One run.

    Args:
        device: the device to run on.
        cases, providers, modes: names of what is run.
        grid: the shapes.
        roofline: the ceilings that times are held against.
        about: what every row says of the run.
        effort: how long to time a call.
        deadline: seconds after which what is left is skipped, and said; None: never.
    """

    device: torch.device
    cases: Sequence[str]
    providers: Sequence[str]
    modes: Sequence[str]
    grid: Grid
    roofline: Roofline
    about: About
    effort: Effort
    deadline: float | None = None
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: int = 0

    def run(self) -> Iterator[str]:
        """Runs everything; lines for people on the way."""
        started = time.perf_counter()
        for name in self.cases:
            case = CASES[name]
            for shape in self.grid.shapes(case.masked):
                for mode in (m for m in case.modes if m in self.modes):
                    if self.deadline is not None and time.perf_counter() - started > self.deadline:
                        self.skipped += 1
                        continue
                    yield f"{name} {mode}: {shape}"
                    yield from self._measure(case, shape, mode)
                    if providers.COMPILE in self.providers or providers.COMPILE_GRAPH in self.providers:
                        torch.compiler.reset()  # one shape's graphs; there is a limit to their number

    def _measure(self, case: Case, shape: Shape, mode: str) -> Iterator[str]:
        try:
            judge = Judge(case, shape, mode, self.device)
        except (RuntimeError, ValueError) as error:
            yield self._failed(case, shape, mode, "eager", error)
            return
        for provider in self.providers:
            try:
                rows = self._provider(case, shape, mode, provider, judge)
            except Exception as error:
                yield self._failed(case, shape, mode, provider, error)
                continue
            self.rows += rows
            yield f"  {provider:<14}" + "  ".join(
                f"{row.metric_name} {row.y_value_50:.4g} ms ({row.extra['roofline_percent']:.0f}%)" for row in rows
            )

    def _failed(self, case: Case, shape: Shape, mode: str, provider: str, error: Exception) -> str:
        kind = "wrong" if isinstance(error, Inaccurate) else f"failed ({type(error).__name__})"
        line = f"{provider} {kind}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        self.failures.append(f"{case.name} {mode}, {shape}: {line}")
        return f"  {line}; not timed"

    def _provider(self, case: Case, shape: Shape, mode: str, provider: str, judge: Judge) -> list[Row]:
        def build() -> timing.Call:
            return providers.make(provider, case, shape, case.inputs(shape, self.device), mode)

        call = build()
        error = judge.check(provider, call())
        flops = case.flops(shape, mode)
        least = self.roofline.seconds(flops, judge.traffic, shape.dtype) * 1e3
        rows = []
        for metric, seconds in self._clocks(provider, build, call):
            timing_of_call = Timing.of(seconds)
            extra = shape.extra() | {
                "flops": flops,
                "bytes": judge.traffic,
                "error": error,
                "roofline_percent": 100 * least / timing_of_call.p50,
                "timings": len(seconds),
            }
            rows.append(self.about.row(case.name, provider, mode, metric, shape.d, timing_of_call, extra))
        return rows

    def _clocks(self, provider: str, build, call: timing.Call) -> Iterator[tuple[str, list[float]]]:
        """Timings by metric. The clocks of a replayed graph of a compiled call are those of ``compile_graph``."""
        if self.device.type != "cuda":
            yield timing.HOST, timing.host_wall(call, self.device, self.effort)
            return
        graphed = provider == providers.COMPILE_GRAPH
        if not graphed:
            yield timing.HOST, timing.host_wall(call, self.device, self.effort)
        if provider == providers.COMPILE:
            return
        graph = timing.Graph(build, self.device)
        if graphed:
            yield timing.HOST, timing.host_wall(graph, self.device, self.effort)
        yield timing.COLD, timing.replays(graph, self.effort, timing.Flush(self.device))
        yield timing.WARM, timing.replays(graph, self.effort, None)
