"""How far inexact gradients are off on average, beside how much gradients differ from batch to batch.

The error of one batch's gradient has two parts. One changes with the batch, as the noise of stochastic gradients does,
and averages out over steps as that does. The other is there in every step: a bias, which training follows.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable

import torch

from ..parallel.layer_parallel import LayerParallel
from .ladder import exact_options
from .rehearsal import Gradients, Rehearsal


@dataclasses.dataclass(frozen=True)
class GradientBias:
    """What :func:`gradient_bias` has measured, relative to the norm of the mean exact gradient.

    Attributes:
        batches: how many.
        bias: norm of the mean error.
        resolution: its standard error; a bias below it has not been seen.
        noise: standard error of the mean exact gradient over as many batches.
        cosine: of the mean gradients, inexact and exact.
    """

    batches: int
    bias: float
    resolution: float
    noise: float
    cosine: float


def gradient_bias(blocks: LayerParallel, losses: Iterable[Callable[[], torch.Tensor]]) -> GradientBias:
    """Compares a stack's gradients with those of exact sweeps over many batches. Collective; changes nothing.

    Args:
        blocks: with the options to be judged; the gradients are those of all its layers, without a consistency term.
        losses: for each batch a function that computes its loss from the stack, as :meth:`ErrorControl.step` takes one;
            at least two.

    Raises:
        ValueError: fewer than two batches, or options that are exact.
    """
    if blocks.options.exact:
        raise ValueError(f"gradient_bias: {blocks.options} is exact; there is nothing to compare")
    sums = _Sums()
    device, keys, stats = blocks.comm.device, copy.deepcopy(blocks.pass_keys), blocks.stats
    try:
        for again in losses:
            with torch.no_grad(), blocks.using(learning=False), blocks.layer_random.preserved(device):
                again()  # the pass that the rehearsal repeats
            rehearsal = Rehearsal(blocks, again, device)
            sums.add(rehearsal.gradients(blocks.options), rehearsal.gradients(exact_options(blocks.options)))
    finally:
        blocks.pass_keys, blocks.stats = keys, stats
    n = sums.count
    if n < 2:
        raise ValueError(f"gradient_bias needs at least 2 batches, got {n}")
    totals = torch.tensor(sums.products(), dtype=torch.float64, device="cpu")
    blocks.comm.sum_ordered([totals])
    error, exact, cross, inexact, errors, exacts = totals.tolist()
    scale = math.sqrt(exact) or math.nan
    return GradientBias(
        n,
        math.sqrt(error) / scale,
        math.sqrt(max(errors - error / n, 0.0) * n / (n - 1)) / scale,
        math.sqrt(max(exacts - exact / n, 0.0) * n / (n - 1)) / scale,
        cross / (scale * math.sqrt(inexact) or math.nan),
    )


class _Sums:
    """Over batches, of this rank's layers: of the exact gradients and the errors, and of their squares."""

    def __init__(self) -> None:
        self.count, self.error_squares, self.exact_squares = 0, 0.0, 0.0
        self.errors: dict[tuple[int, int], torch.Tensor] = {}
        self.exacts: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, inexact: Gradients, exact: Gradients) -> None:
        self.count += 1
        for n, gradients in exact.by_layer.items():
            for i, (a, b) in enumerate(zip(inexact.by_layer[n], gradients, strict=True)):
                present = a if a is not None else b
                if present is None:
                    continue
                a, b = (torch.zeros_like(present) if g is None else g for g in (a, b))
                a, b = a.double(), b.double()
                self.error_squares += float((a - b).square().sum())
                self.exact_squares += float(b.square().sum())
                for store, value in ((self.errors, a - b), (self.exacts, b)):
                    store[n, i] = store[n, i] + value if (n, i) in store else value

    def products(self) -> list[float]:
        """Squares of sums, their product, and sums of squares."""
        pairs = [(self.errors[key], self.exacts[key]) for key in self.errors]
        error = sum(float(e.square().sum()) for e, _ in pairs)
        exact = sum(float(g.square().sum()) for _, g in pairs)
        cross = sum(float(((e + g) * g).sum()) for e, g in pairs)
        inexact = sum(float((e + g).square().sum()) for e, g in pairs)
        return [error, exact, cross, inexact, self.error_squares, self.exact_squares]
