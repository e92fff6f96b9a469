"""Three ways to time a call: wall clock on the host, and CUDA graph replays with a cold and with a warm L2 cache.

The wall clock has all that the host costs and is what an eager script pays. A graph's replays show the GPU alone: with
a cold cache, as in a training step where other layers have passed in between, and with a warm one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

HOST, COLD, WARM = "host_wall", "graph_cold_l2", "graph_warm_l2"
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median and 20th and 80th percentile, in milliseconds."""

    p50: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The statistics of single timings."""
        if len(seconds) == 1:
            return cls(*[seconds[0] * 1e3] * 3)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds) * 1e3, fifths[0] * 1e3, fifths[3] * 1e3)


@dataclass(frozen=True)
class Effort:
    """How long to time one call.

    Attributes:
        seconds: stop when so much time has been timed.
        least, most: timings taken at least and at most.
    """

    seconds: float = 0.2
    least: int = 5
    most: int = 200


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_wall(call: Call, device: torch.device, effort: Effort) -> list[float]:
    """Seconds of single calls until the device has finished, after two that do not count."""
    for _ in range(2):
        call()
    synchronize(device)
    timings: list[float] = []
    spent = 0.0
    while len(timings) < effort.least or (spent < effort.seconds and len(timings) < effort.most):
        started = time.perf_counter()
        call()
        synchronize(device)
        timings.append(time.perf_counter() - started)
        spent += timings[-1]
    return timings


class Graph:
    """A call captured as a CUDA graph; calling it replays it.

    Args:
        make: makes the call. It runs on the stream of the capture, so that a forward pass it makes for a backward to be
            timed lies on the stream where autograd will run that backward.
    """

    def __init__(self, make: Callable[[], Call], device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            call = make()
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self.result = call()
        self._call = call  # what was captured works on tensors that the call holds

    def __call__(self) -> object:
        self._graph.replay()
        return self.result


class Flush:
    """Overwrites a buffer twice the size of the L2 cache, so that what follows finds none of its data there."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(2 * size, 1 << 27), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


def replays(graph: Call, effort: Effort, flush: Flush | None) -> list[float]:
    """Seconds of single replays by the GPU's clock; with ``flush``, from a cold cache.

    The host runs ahead: while the GPU is busy with a flush, or with earlier replays, the next ones are queued, so that
    no gap of the host's is timed.
    """
    for _ in range(3):
        graph()
    torch.cuda.synchronize()
    started = time.perf_counter()
    graph()
    torch.cuda.synchronize()
    once = time.perf_counter() - started
    count = max(effort.least, min(effort.most, int(effort.seconds / once)))
    # Events cost about a microsecond each: several replays between two of them where the cache may be warm.
    inner = 1 if flush else 10
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in events:
        if flush:
            flush()
        begin.record()
        for _ in range(inner):
            graph()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 / inner for begin, end in events]
