"""What the device reaches at best, measured: matrix products and copies. Everything else is held against these."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .timing import Effort, Flush, Graph, host_wall, replays


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings of a device.

    Attributes:
        flops: of a large matrix product, by dtype, in operations per second.
        bandwidth: of a large copy, read and write counted, in bytes per second.
    """

    flops: dict[torch.dtype, float]
    bandwidth: float

    def seconds(self, flops: float, size: float, dtype: torch.dtype) -> float:
        """The least time for so many operations and bytes of memory traffic."""
        return max(flops / self.flops[dtype], size / self.bandwidth)

    def __str__(self) -> str:
        products = ", ".join(f"{f / 1e12:.3g} TFLOP/s {str(t).removeprefix('torch.')}" for t, f in self.flops.items())
        return f"measured ceilings: {products}; copy {self.bandwidth / 1e9:.4g} GB/s"


def measure(device: torch.device, dtypes: Sequence[torch.dtype], small: bool = False) -> Roofline:
    """Measures them in about a second. small: with sizes that a busy CPU gets through quickly."""
    cuda = device.type == "cuda"
    n, size = (8192, 1 << 30) if cuda else ((256, 1 << 22) if small else (1024, 1 << 26))
    flops = {}
    for dtype in dtypes:
        a = torch.randn(n, n, device=device).to(dtype)
        flops[dtype] = 2 * n**3 / _best(lambda a=a: a @ a, device)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    return Roofline(flops, 2 * size / _best(lambda: target.copy_(source), device))


def _best(call, device: torch.device) -> float:
    effort = Effort(seconds=0.1, least=3, most=50)
    if device.type == "cuda":
        return statistics.median(replays(Graph(lambda: call, device), effort, Flush(device)))
    return statistics.median(host_wall(call, device, effort))
