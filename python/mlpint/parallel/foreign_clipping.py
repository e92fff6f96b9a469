"""Gradient clipping by others, torch's own and all that calls it, with layers on several ranks.

``torch.nn.utils.clip_grad_norm_`` is what scripts call, ``transformers.Trainer`` by default, and accelerate. It knows
the gradients of its own process alone: with the layers on several ranks each rank would scale by another norm, and what
all of them hold a copy of would drift apart, silently. None of these callers can be told to use
:func:`mlpint.clip_grad_norm_`, and many hold the function by a name of their own. So the norm that it takes is replaced
inside torch, once a stack of several ranks runs: where gradients of such a stack are given, the norm is that of all
ranks; everywhere else it is torch's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import clip_grad

from ..mgrit.stats import Stats
from . import spread_stacks
from .clip import squared_grad_norm
from .layer_parallel import LayerParallel
from .ties import ancestors_of

_measured: WeakKeyDictionary[LayerParallel, Stats] = WeakKeyDictionary()  # whose gradients' norm was taken


def install() -> None:
    """Lets torch take the norm of a layer-parallel model over all ranks; nothing changes for other models."""
    if getattr(clip_grad._get_total_norm, "knows_stacks", False):
        return
    of_this_process = clip_grad._get_total_norm

    @functools.wraps(of_this_process)
    def total_norm(
        tensors: torch.Tensor | Iterable[torch.Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        gradients = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        stacks = _stacks_of(gradients)
        if not stacks:
            return of_this_process(gradients, norm_type, error_if_nonfinite, foreach)
        if float(norm_type) != 2:
            raise ValueError(
                f"norm_type = {norm_type!r}: the gradients of layers on several ranks can be clipped by the Euclidean "
                "norm alone, norm_type=2"
            )
        own = {id(p.grad) for stack in stacks for p in stack.parameters() if p.grad is not None}
        outside = [g for g in gradients if id(g) not in own]
        with torch.no_grad(), _without_other_gradients(stacks, {id(g) for g in gradients}):
            square = squared_grad_norm(nn.ModuleList(stacks))
        norm = math.sqrt(square + float(of_this_process(outside, 2.0, False, foreach)) ** 2)
        if error_if_nonfinite and not math.isfinite(norm):
            raise RuntimeError(f"the norm of the gradients of all ranks is {norm}, so they cannot be clipped")
        device = gradients[0].device if gradients else stacks[0].comm.device
        return torch.tensor(norm, dtype=torch.float64, device=device)

    total_norm.knows_stacks = True  # type: ignore[attr-defined]
    clip_grad._get_total_norm = total_norm  # what torch.nn.utils.clip_grad_norm_ calls, by whatever name it is held
    torch.nn.utils.get_total_norm = total_norm


def _stacks_of(gradients: list[torch.Tensor]) -> list[LayerParallel]:
    """The stacks of several ranks that have some of the gradients, here or on other ranks.

    A rank on which a stack has nothing to train (no layers, or frozen ones) goes by the model around it: it takes
    part where gradients of that are given, or none at all, once after each pass that went backward.
    """
    given: set[int] = {id(g) for g in gradients}
    stacks: list[LayerParallel] = []
    for stack in spread_stacks.registered():
        assert isinstance(stack, LayerParallel)
        if any(p.requires_grad for p in stack.parameters()):
            takes_part = any(id(p.grad) in given for p in stack.parameters() if p.grad is not None)
        else:
            takes_part = stack.stats.seconds["backward"] > 0 and _measured.get(stack) is not stack.stats
            if takes_part and given:
                around = (p for module in ancestors_of(stack) for p in module.parameters())
                takes_part = any(id(p.grad) in given for p in around if p.grad is not None)
        if takes_part:
            stacks.append(stack)
            _measured[stack] = stack.stats
    return stacks


@contextmanager
def _without_other_gradients(stacks: list[LayerParallel], given: set[int]) -> Iterator[None]:
    """Inside, the stacks have no gradients but the given ones."""
    parameters = (p for stack in stacks for p in stack.parameters())
    others = [(p, p.grad) for p in parameters if p.grad is not None and id(p.grad) not in given]
    for parameter, _ in others:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in others:
            parameter.grad = gradient


spread_stacks.at_first.append(install)
