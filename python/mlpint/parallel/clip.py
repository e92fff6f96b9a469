"""Gradient clipping over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from ..comm.agreement import agree
from .layer_parallel import LayerParallel


def stacks_of(model: nn.Module) -> Iterator[tuple[str, LayerParallel]]:
    """The LayerParallel stacks in a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LayerParallel):
            yield name, module


def _square(tensors: list[torch.Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors)


def squared_grad_norm(model: nn.Module) -> float:
    """Sum of squares of all gradients of the unwrapped model, each parameter counted once. Collective.

    Added up layer by layer in the order of the layers, whichever ranks hold them: the same to the last bit on every
    rank and for any number of ranks.
    """
    stacks = list(stacks_of(model))
    counted: set[nn.Parameter] = set()
    total = 0.0
    for name, stack in stacks:
        agree(stack.comm, {"operation": "gradient norm", "stack": name})
        elsewhere = {p for p, ranks in stack.shared_parameters if ranks[0] != stack.comm.rank}
        squares = torch.zeros(len(stack), dtype=torch.float64)
        for n, gradients in stack.store.gradients(elsewhere | counted).items():
            squares[n] = _square(gradients)
        counted.update(stack.parameters())
        if stack.comm.size > 1:
            stack.comm.sum_ordered([squares])
        total += sum(squares.tolist())
    rest = [p.grad for p in model.parameters() if p not in counted and p.grad is not None]
    return total + _square(rest)


def clip_grad_norm_(model: nn.Module, max_norm: float) -> float:
    """Scales all gradients so that their global norm over all layer ranks is at most ``max_norm``. Collective.

    Args:
        model: a module with any number of LayerParallel stacks in it; what lies outside them is the same on every rank.
        max_norm: positive; ``math.inf`` measures without scaling.

    Returns:
        The norm before scaling, the same on every rank. Where it is not finite, so are the gradients afterwards, as
        with ``torch.nn.utils.clip_grad_norm_``.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm = {max_norm!r}: must be positive")
    norm = math.sqrt(squared_grad_norm(model))
    scale = max_norm / (norm + 1e-6)
    if not scale >= 1:
        for gradient in {p.grad for p in model.parameters() if p.grad is not None}:
            gradient.mul_(scale)
    return norm
