"""What layers may do beside returning their state, and a stack could not pass on: noticed by name."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..state import version
from .arguments import ABSENT, PerLayer

_DEPTH = 4  # of objects in objects that are looked into
_CLOSED = (nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType, torch.Generator)

# The name of a part of an argument, the part, and a number that tells whether the part has changed.
Part = tuple[str, Any, int]


class ArgumentWatch:
    """Notices layers that fill lists or dictionaries among their arguments, or change tensors there in place.

    Args:
        arguments: the positional and keyword arguments that the layers are given.
    """

    def __init__(self, arguments: tuple[tuple, dict[str, Any]]) -> None:
        self._arguments = arguments
        self._parts = list(self._walk())
        self.has_containers = any(not isinstance(part, torch.Tensor) for _, part, _ in self._parts)

    def changed(self) -> str | None:
        """The name of an argument that has changed since; None if none has."""
        parts = list(self._walk())
        for (name, part, number), (_, old, before) in zip(parts, self._parts, strict=False):
            if part is not old or number != before:
                return name
        longer, shorter = sorted((parts, self._parts), key=len, reverse=True)
        return longer[len(shorter)][0] if len(longer) > len(shorter) else None

    def _walk(self) -> Iterator[Part]:
        args, kwargs = self._arguments
        visited: set[int] = set()
        for name, value in [*((f"number {i + 1}", a) for i, a in enumerate(args)), *kwargs.items()]:
            yield from _parts(name, value, visited, _DEPTH)


def _parts(name: str, value: Any, visited: set[int], depth: int) -> Iterator[Part]:
    if isinstance(value, torch.Tensor):
        yield name, value, version(value)
        return
    if id(value) in visited or not depth or value is ABSENT or isinstance(value, _CLOSED):
        return
    visited.add(id(value))
    if isinstance(value, tuple | PerLayer):
        inside: list[Any] = list(value.values if isinstance(value, PerLayer) else value)
    elif isinstance(value, Mapping):
        inside = list(value.values())
        yield name, value, len(inside)
    elif isinstance(value, list | set):
        inside = list(value)
        yield name, value, len(inside)
    elif isinstance(getattr(value, "__dict__", None), dict):
        inside = list(vars(value).values())
        yield name, value, len(inside)
    else:
        return
    for part in inside:
        if isinstance(part, torch.Tensor) or not isinstance(part, bool | int | float | str | type(None)):
            yield from _parts(name, part, visited, depth - 1)


class BufferWatch:
    """Notices buffers that evaluations of the layers move (running statistics, power iterations).

    Args:
        layers: own layers by index.
    """

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self._layers = layers
        self._before = self._buffers()

    def moved(self) -> str | None:
        """The name of a buffer that is not as it was; None if all are."""
        for name, (buffer, number) in self._buffers().items():
            old, before = self._before.get(name, (None, 0))
            if buffer is not old or number != before:
                return name
        return None

    def _buffers(self) -> dict[str, tuple[torch.Tensor, int]]:
        return {
            f"{n}.{name}": (buffer, version(buffer))
            for n, layer in self._layers.items()
            for name, buffer in layer.named_buffers()
        }


@contextmanager
def kept_buffers(layers: Mapping[int, nn.Module]) -> Iterator[None]:
    """Inside, layers are evaluated for their own sake: their buffers are put back."""
    before = [(b, b.clone(), version(b)) for layer in layers.values() for b in layer.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value, number in before:
                if version(buffer) != number:
                    buffer.copy_(value)


def refuse_gradient(_: torch.Tensor) -> None:
    """A hook for what a layer is evaluated at: only the stack's own backward may come here."""
    raise RuntimeError(
        "[mlpint] a loss was computed from a tensor that a layer of a LayerParallel stack has kept (in an attribute, "
        "say): its gradient ends inside the layer. Return what the loss needs as a part of the layers' state"
    )


def host_generators() -> tuple[Any, ...]:
    """The states of Python's generator and of NumPy's, where it is in use."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    _, words, position, *_ = numpy.random.get_state()
    return random.getstate(), words.tobytes(), position
