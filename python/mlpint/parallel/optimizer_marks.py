"""Optimiser states say which rank's layers they are of, so that no rank takes up another's.

An optimiser numbers its parameters, and where layers are spread over ranks number 7 is another layer on each. Scripts
and trainers that save ``optimizer.state_dict()`` on one rank, or on all into one file, would hand one rank's moments to
the layers of all, silently. So states with a stack's own layers in them are marked, and a rank refuses the mark of
another. :func:`mlpint.checkpoint.save` and :class:`mlpint.hf.TrainerMixin` go by the names of parameters instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

MARK = "mlpint_layers_of_rank"
_stacks: WeakSet[nn.Module] = WeakSet()
_foreign_are_left_out = False


def mark_states(stack: nn.Module) -> None:
    """From now on states of optimisers that have layers of this stack of several ranks are marked."""
    _stacks.add(stack)
    kind: Any = torch.optim.Optimizer
    if not hasattr(kind.state_dict, "marks"):
        kind.state_dict = _marking(kind.state_dict)
        kind.load_state_dict = _checking(kind.load_state_dict)


@contextmanager
def foreign_states_left_out() -> Iterator[None]:
    """Inside, another rank's state is no error: the settings of its groups (rates and the like) alone are taken up."""
    global _foreign_are_left_out
    _foreign_are_left_out = True
    try:
        yield
    finally:
        _foreign_are_left_out = False


def _mark(optimizer: torch.optim.Optimizer) -> str | None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for stack in list(_stacks):
        if any(id(p) in held for p in stack.parameters()):
            comm: Any = stack.comm
            return f"{comm.rank} of {comm.size}"
    return None


def _marking(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(state_dict)
    def marked(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        result, mark = state_dict(self, *args, **kwargs), _mark(self)
        if mark is not None:
            result[MARK] = mark
        return result

    marked.marks = True  # type: ignore[attr-defined]
    return marked


def _checking(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_state_dict)
    def checked(self: torch.optim.Optimizer, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        own, given = _mark(self), state_dict.get(MARK) if isinstance(state_dict, dict) else None
        if own is not None and given is not None and own != given:
            if _foreign_are_left_out:
                for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
                    group.update({name: value for name, value in saved.items() if name != "params"})
                return None
            raise RuntimeError(
                f"the optimiser state belongs to the layers of rank {given}, and these are those of rank {own}: save "
                "and load with mlpint.checkpoint, which goes by names on any number of ranks; with transformers put "
                "mlpint.hf.TrainerMixin before Trainer; or keep a file for each rank"
            )
        return load_state_dict(self, state_dict, *args, **kwargs)

    return checked
