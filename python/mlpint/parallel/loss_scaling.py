"""Scalers of losses (float16): where gradients overflow on one rank, the step is skipped on all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from . import spread_stacks


def install() -> None:
    """Lets ``torch.amp.GradScaler`` skip steps of stacks of several ranks on all of these alike.

    A rank has gradients of its own layers alone, and torch's scaler looks at what its rank has: one rank would skip a
    step that the others take. So what it finds is added up over the ranks, by a wrapper around the method that finds
    it, where a stack's parameters are among the optimiser's. Nothing else changes, and nobody else pays for it.
    """
    if not hasattr(GradScaler._unscale_grads_, "__wrapped__"):
        GradScaler._unscale_grads_ = _agreed(GradScaler._unscale_grads_)  # type: ignore[method-assign]


def _agreed(unscale: Callable[..., dict[torch.device, torch.Tensor]]) -> Any:
    @functools.wraps(unscale)
    def agreed(scaler: GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> dict[torch.device, torch.Tensor]:
        overflows = unscale(scaler, optimizer, *args, **kwargs)
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        stacks: Any = spread_stacks.registered()
        for stack in stacks:
            own = set(stack.parameters())
            if own and own.isdisjoint(owned):  # a rank without layers takes part with the others
                continue
            here = sum(float(overflow) for overflow in overflows.values())
            if stack.comm.transport.control.sum(here):
                if not overflows:  # a rank without gradients skips with the others
                    overflows[stack.comm.device] = torch.zeros((), device=stack.comm.device)
                for overflow in overflows.values():
                    overflow.fill_(1.0)
        return overflows

    return agreed


spread_stacks.at_first.append(install)
