"""The pass of a process that is alone and exact: the loop over the layers itself, under autograd itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..layers.propagators import output_tensors
from ..layers.stack_evaluator import key_lengths
from ..mgrit.vectors import extrapolate
from ..state import State

if TYPE_CHECKING:
    from .layer_parallel import LayerParallel

Tensors = tuple[torch.Tensor, ...]


def plain_pass(stack: LayerParallel, state: Tensors, single: bool, args: tuple, kwargs: dict) -> Tensors:
    """The state after the last layer; ``single`` says that layers take a tensor, not a tuple."""
    _, key = stack.next_key()
    device, draws = state[0].device, stack.random.draws
    if stack.stacked is not None:
        keys = [stack.random.key_of(*key, n) for n in stack.local_indices] if stack.stacked.drops else None
        step_sizes = [stack.step_size_of(n) for n in stack.local_indices]
        state = (stack.stacked.forward_in_turn(state[0], key_lengths(args, kwargs, single), keys, step_sizes),)
    elif any(draws(n, layer.training) for n, layer in stack.local_layers.items()):
        with stack.random.preserved(device):
            for n in range(stack.layer_count):
                with stack.random.keyed(*key, n, stack.local_layers[n].training, device):
                    state = _step(stack, n, state, single, args, kwargs)
    else:
        for n in range(stack.layer_count):
            state = _step(stack, n, state, single, args, kwargs)
    stats, count = stack.stats, stack.layer_count
    stats.evaluations["forward"][0] = count
    stats.iterations["forward"] = 0
    if state[0].requires_grad:

        def came_back(_: torch.Tensor) -> None:
            stats.evaluations["combined_vjp"][0] = count
            stats.iterations["backward"] = 0

        state[0].register_hook(came_back)
    return state


def _step(stack: LayerParallel, n: int, state: Tensors, single: bool, args: tuple, kwargs: dict) -> Tensors:
    output = stack.local_layers[n](state[0] if single else state, *args, **kwargs)
    new = output_tensors(n, output, state, single)
    h = stack.step_size_of(n)
    return new if h == 1 else extrapolate(State(state), State(new), h).tensors
