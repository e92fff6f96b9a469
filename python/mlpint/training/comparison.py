"""What layer-parallel training gains and what it costs: time and gradient against the exact serial sweep."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ..comm.communicator import Comm
from ..control.ladder import exact_options
from ..parallel.layer_parallel import LayerParallel


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Layer-parallel against exact, on the same ranks with the same weights and batches.

    Attributes:
        seconds, exact_seconds: medians for one forward and backward.
        gradient_error: ||g - g_exact|| / ||g_exact|| on one batch (of each replica), over all parameters of all ranks.
        gradient_cosine: <g, g_exact> / (||g|| ||g_exact||) there.
    """

    seconds: float
    exact_seconds: float
    gradient_error: float
    gradient_cosine: float

    @property
    def speedup(self) -> float:
        return self.exact_seconds / self.seconds


def compare(
    model: nn.Module, blocks: LayerParallel, pass_: Callable[[int], object], count: int, comm: Comm
) -> Comparison:
    """Takes turns between both ways over the same batches. Collective. Weights are left as they are, gradients cleared.

    Args:
        model: with ``blocks`` in it.
        blocks: the stack.
        pass_: forward and backward on batch 0, 1, ...; the same random numbers for the same batch.
        count: batches.
        comm: the ranks, those of one replica in a mesh of several.
    """
    seconds: dict[str, list[float]] = {"parallel": [], "exact": []}
    gradients: dict[str, dict[nn.Parameter, torch.Tensor]] = {}
    for n in range(-1, count):  # batch -1 warms up both ways and gives the gradients
        for way in ("parallel", "exact") if n % 2 else ("exact", "parallel"):
            model.zero_grad(set_to_none=True)
            comm.world.barrier()
            started = time.perf_counter()
            exactly = {"options": exact_options(blocks.options)} if way == "exact" else {}
            with blocks.using(consistency=0.0, **exactly):
                pass_(max(n, 0))
            _finish()
            comm.world.barrier()  # so that the time is that of the slowest rank
            if n >= 0:
                seconds[way].append(time.perf_counter() - started)
            else:
                gradients[way] = {p: p.grad for p in model.parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    error, cosine = _difference(gradients["parallel"], gradients["exact"], blocks, comm)
    return Comparison(statistics.median(seconds["parallel"]), statistics.median(seconds["exact"]), error, cosine)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _difference(
    ours: dict[nn.Parameter, torch.Tensor], exact: dict[nn.Parameter, torch.Tensor], blocks: LayerParallel, comm: Comm
) -> tuple[float, float]:
    """Relative error and cosine over all ranks and replicas.

    Outside the stack every rank of a replica has the same gradients: its rank 0's count.
    """
    of_stack = set(blocks.parameters())
    sums = torch.zeros(4, dtype=torch.float64)
    for parameter in ours:
        if comm.rank == 0 or parameter in of_stack:
            a, b = ours[parameter].double().flatten(), exact[parameter].double().flatten()
            sums += torch.stack([a @ a, b @ b, a @ b, (a - b) @ (a - b)]).cpu()
    comm.world.sum_ordered([sums])
    aa, bb, ab, dd = sums.tolist()
    return math.sqrt(dd / bb), ab / math.sqrt(aa * bb)
