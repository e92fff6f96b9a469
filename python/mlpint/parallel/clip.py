"""Gradient clipping over all ranks."""

from __future__ import annotations

import itertools
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


def _squares(tensors: list[torch.Tensor]) -> list[float]:
    """The square of the norm of each, brought to the host in one transfer a device."""
    squares: dict[int, float] = {}
    for device in dict.fromkeys(t.device for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.device == device]
        norms = torch.stack(torch._foreach_norm([tensors[i] for i in places], 2, dtype=torch.float64)).tolist()
        squares |= {i: norm**2 for i, norm in zip(places, norms, strict=True)}
    return [squares[i] for i in range(len(tensors))]


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
        squares = torch.zeros(len(stack), dtype=torch.float64, device="cpu")
        by_layer = stack.store.gradients(elsewhere | counted)
        norms = iter(_squares([g for gradients in by_layer.values() for g in gradients]))
        for n, gradients in by_layer.items():
            squares[n] = sum(itertools.islice(norms, len(gradients)))
        counted.update(stack.parameters())
        if stack.comm.size > 1:
            stack.comm.sum_ordered([squares])
        total += sum(squares.tolist())
    rest = [p.grad for p in model.parameters() if p not in counted and p.grad is not None]
    return total + sum(_squares(rest))


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
    scale_down(model, norm, max_norm)
    return norm


def scale_down(model: nn.Module, norm: float, max_norm: float) -> None:
    """Scales all gradients, whose norm over all ranks is known, so that it is at most ``max_norm``."""
    scale = max_norm / (norm + 1e-6)
    if not scale >= 1:
        for gradient in {p.grad for p in model.parameters() if p.grad is not None}:
            gradient.mul_(scale)
