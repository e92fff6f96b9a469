"""Whether a provider computes the right thing, decided before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import providers
from .cases import FORWARD, Case, tensors, widened
from .shapes import Shape

ROUNDINGS = 4.0  # of the largest entry, that anybody may be off by
PLAIN_ROUNDINGS = 64.0  # that plain PyTorch may be off by, which is held against nobody else


class Inaccurate(Exception):
    """A result that is further from the reference than it may be."""


class Judge:
    """Knows the right results of a case and how far plain PyTorch is from them.

    Attributes:
        traffic: the least memory traffic in bytes, inputs read once and results written once.
    """

    def __init__(self, case: Case, shape: Shape, mode: str, device: torch.device) -> None:
        self._case, self._dtype = case, shape.dtype
        # Inputs are made anew for everyone: what works in place changes them.
        inputs = case.inputs(shape, device)
        read = sum(t.nbytes for t in tensors({k: v for k, v in inputs.items() if k != "grad" or mode != FORWARD}))
        self._plain = providers.joined(providers.looped(case, inputs, mode)())
        self.traffic = float(read + sum(t.nbytes for t in self._plain))
        inputs = widened(case.inputs(shape, device))
        self._exact = case.comparable(providers.joined(providers.looped(case, inputs, mode)()), inputs)
        self._inputs = inputs
        self._plain = case.comparable(self._plain, inputs)

    def check(self, provider: str, results: object) -> float:
        """Largest error, relative to the largest entry of the reference.

        Raises:
            Inaccurate: naming the result and both errors.
        """
        comparable = self._case.comparable(providers.joined(results), self._inputs)
        if provider == providers.EAGER:
            return check(comparable, self._exact, self._exact, self._dtype, PLAIN_ROUNDINGS)
        return check(comparable, self._plain, self._exact, self._dtype)


def check(
    results: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    dtype: torch.dtype,
    roundings: float = ROUNDINGS,
) -> float:
    """Largest error of some results, relative to the largest entry of the reference.

    The rule is flash-attention's: max|x - exact| <= 2 max|plain - exact| + atol, tensor by tensor, with atol so many
    roundings of the largest entry.

    Args:
        results: what is to be checked.
        plain: those of plain PyTorch in the same dtype.
        exact: those of plain PyTorch in float64, from the same inputs.
        dtype: that of the computation.
        roundings: how many roundings of the largest entry are allowed on top.

    Raises:
        Inaccurate: naming the result and both errors.
    """
    if len(results) != len(exact):
        raise Inaccurate(f"{len(results)} results, and {len(exact)} are wanted")
    worst = 0.0
    for number, (x, p, e) in enumerate(zip(results, plain, exact, strict=True)):
        if x.shape != e.shape:
            raise Inaccurate(f"result {number} has shape {tuple(x.shape)}, and {tuple(e.shape)} is wanted")
        scale = float(e.abs().max())
        error, allowed = _distance(x, e), 2 * _distance(p, e) + roundings * torch.finfo(dtype).eps * scale
        if not error <= allowed:  # NaN is never right
            raise Inaccurate(f"result {number} is off by {error:.2e}, and at most {allowed:.2e} is allowed")
        worst = max(worst, error / scale if scale else 0.0)
    return worst


def _distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.detach().to(exact.dtype) - exact.detach()).abs().max())
