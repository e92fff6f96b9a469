"""The pass of a process that is alone and exact: the loop over the layers itself, under autograd itself."""

from __future__ import annotations

from typing import Any

import torch

from ..layers.evaluator import LayerCall
from .conditions import Conditions, PassSetup

Tensors = tuple[torch.Tensor, ...]


def is_plain(conditions: Conditions) -> bool:
    """Whether the loop over the layers is all there is to do."""
    c = conditions
    alone = c.layout.ranks == 1 and c.options.exact and c.serial_microbatches == 1
    return alone and not c.recompute and not c.consistency


def plain_pass(setup: PassSetup, state: Tensors, single: bool, args: tuple, kwargs: dict[str, Any]) -> Tensors:
    """The state after the last layer; ``single`` says that layers take a tensor, not a tuple."""
    c, stats = setup.conditions, setup.stats
    call = LayerCall((args, kwargs), single, c.layout.step_size_of, c.layer_random, setup.key, stats)
    state = c.store.run(call, state)
    count = len(c.layout)
    stats.evaluations["forward"][0] = count
    stats.iterations["forward"] = 0
    if state[0].requires_grad:

        def came_back(_: torch.Tensor) -> None:
            stats.evaluations["combined_vjp"][0] = count
            stats.iterations["backward"] = 0

        state[0].register_hook(came_back)
    return state
