"""The layer-parallel stacks of several ranks that this process has called, for what has to know of them unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

from torch import nn

_stacks: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()  # in the order of their first calls
at_first: list[Callable[[], None]] = []  # what to do once there is one


def register(stack: nn.Module) -> None:
    """Notes a stack that is called."""
    if stack not in _stacks:
        _stacks[stack] = None
        while at_first:
            at_first.pop()()


def registered() -> Iterator[nn.Module]:
    return iter(list(_stacks))
