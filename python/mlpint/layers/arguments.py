"""What each layer of a stack is called with: arguments that are the same for all layers, and those of single layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils import _pytree as pytree


class PerLayer:
    """An argument that has a value of its own for each layer, as in ``blocks(x, mask=PerLayer([m0, m1, ...]))``.

    Args:
        values: one for each layer of the stack, open and close layers included, in order. Tensors among them that
            require a gradient get theirs, on every rank.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = tuple(values)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"PerLayer of {len(self)} values"


class _Absent:
    """Stands for an argument that a layer is not given while others are."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()

# So that tensors in the values are found, given their gradients and sliced like those of any other argument.
pytree.register_pytree_node(
    PerLayer, lambda argument: (list(argument.values), None), lambda values, _: PerLayer(values)
)


def has_arguments_by_layer(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether layers are called with different arguments."""
    return any(isinstance(argument, PerLayer) for argument in (*args, *kwargs.values()))


def check_arguments(args: Sequence[Any], kwargs: dict[str, Any], layers: int) -> None:
    """Raises a ValueError for an argument by layer that has not one value for each of the layers."""
    for name, value in [*((f"argument {i + 1}", a) for i, a in enumerate(args)), *kwargs.items()]:
        if isinstance(value, PerLayer) and len(value) != layers:
            raise ValueError(f"{name} has {len(value)} values and the stack {layers} layers: give one for each layer")


def selected(
    args: Sequence[Any], kwargs: dict[str, Any], layers: Sequence[int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of some of the layers, numbered anew."""

    def select(argument: Any) -> Any:
        return PerLayer(argument.values[n] for n in layers) if isinstance(argument, PerLayer) else argument

    return tuple(map(select, args)), {name: select(argument) for name, argument in kwargs.items()}


def arguments_of(args: Sequence[Any], kwargs: dict[str, Any], layer: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of one layer."""
    own = [a.values[layer] if isinstance(a, PerLayer) else a for a in args]
    while own and own[-1] is ABSENT:
        own.pop()
    named = {name: a.values[layer] if isinstance(a, PerLayer) else a for name, a in kwargs.items()}
    return tuple(own), {name: a for name, a in named.items() if a is not ABSENT}


def joined(calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One set of arguments for all layers from the calls of each: what differs becomes a :class:`PerLayer`."""
    count = max(len(args) for args, _ in calls)
    columns = [[args[i] if i < len(args) else ABSENT for args, _ in calls] for i in range(count)]
    names = dict.fromkeys(name for _, kwargs in calls for name in kwargs)
    rows = {name: [kwargs.get(name, ABSENT) for _, kwargs in calls] for name in names}
    return tuple(map(_joined, columns)), {name: _joined(values) for name, values in rows.items()}


def _joined(values: list[Any]) -> Any:
    first = pytree.tree_flatten(values[0])
    return values[0] if all(_same(pytree.tree_flatten(v), first) for v in values[1:]) else PerLayer(values)


def _same(a: tuple[list[Any], Any], b: tuple[list[Any], Any]) -> bool:
    """Whether two flattened values are the same objects, or equal numbers and strings, in the same structure."""
    plain = (bool, int, float, str, type(None))
    return a[1] == b[1] and all(
        x is y or isinstance(x, plain) and type(x) is type(y) and x == y for x, y in zip(a[0], b[0], strict=True)
    )
