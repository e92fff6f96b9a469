"""A batch that goes through layers in slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..state import State

Tensors = tuple[torch.Tensor, ...]


class BatchSlices:
    """A batch of samples, cut along the first dimension of its tensors into parts as equal as they can be.

    Args:
        batch: number of samples.
        count: number of slices; no more than there are samples.
    """

    def __init__(self, batch: int, count: int) -> None:
        self.batch = batch
        self.bounds = [(i * batch // count, (i + 1) * batch // count) for i in range(count)]

    def __len__(self) -> int:
        return len(self.bounds)

    def slice(self, state: State, i: int) -> State:
        """Slice i of a state; views."""
        start, end = self.bounds[i]
        return State(t[start:end] for t in state.tensors)

    def join(self, states: Sequence[State]) -> State:
        """The state that all its slices make."""
        return State(torch.cat(parts) for parts in zip(*(s.tensors for s in states), strict=True))

    def argument(self, argument: Any, i: int) -> Any:
        """Slice i of an argument, if it is a tensor with the batch as its first dimension."""
        if not isinstance(argument, torch.Tensor) or argument.shape[:1] != (self.batch,) or self.batch == 1:
            return argument
        return argument[slice(*self.bounds[i])]


def mixes_samples(run: Callable[[Tensors], Tensors], batch: Tensors) -> bool:
    """Whether what layers make of a sample depends on others: with the last one turned round, the rest changes.

    Args:
        run: the layers, with the same random numbers each time.
        batch: an example of their state, of at least two samples.
    """
    turned = tuple(torch.cat([t[:-1], -t[-1:]]) if t.is_floating_point() else t for t in batch)
    for before, after in zip(run(batch), run(turned), strict=True):
        if before.is_floating_point():
            rounding = before[:-1].abs().amax() * torch.finfo(before.dtype).eps ** 0.5
            if (before[:-1] - after[:-1]).abs().amax() > rounding:
                return True
    return False


def can_be_sliced(state: State, arguments: tuple[tuple, dict[str, Any]]) -> bool:
    """Whether it is clear what goes by the batch.

    All tensors of the state must; of the arguments it is not clear where the batch's size is another dimension's too.
    """
    batch = state.tensors[0].shape[:1]
    if not batch or any(t.shape[:1] != batch for t in state.tensors):
        return False
    other_sizes = {size for t in state.tensors for size in t.shape[1:]}

    def unclear(argument: Any) -> bool:
        if isinstance(argument, torch.Tensor):
            shape = argument.shape
            return shape[:1] == batch and (batch[0] in other_sizes or batch[0] in shape[1:])
        return isinstance(argument, list | tuple) and len(argument) == batch[0]

    args, kwargs = arguments
    return not any(map(unclear, (*args, *kwargs.values(), *pytree.tree_leaves(arguments))))
