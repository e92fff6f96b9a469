"""A model's own loop over its layers, recorded: who is called with what, while the state stays where it is.

A layer-parallel stack cannot evaluate its layers when the loop calls them: they are on many ranks and are evaluated
together. So the loop runs over stand-ins that note their arguments and hand a token on in the place of the state, and
the last one solves. A loop that does anything else with the state than to hand it from layer to layer would be wrong by
that, silently: the token refuses all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..parallel.compiled import not_compiled

Call = tuple[tuple[Any, ...], dict[str, Any]]
# What a loop may ask a state between two layers: it is the same before and after.
_QUESTIONS = frozenset(
    "shape dtype device ndim layout requires_grad is_cuda is_cpu is_meta is_sparse is_nested is_leaf names grad_fn "
    "size dim numel stride is_floating_point is_complex get_device element_size __len__ is_contiguous".split()
)
_ADVICE = (
    "a layer-parallel stack can only run loops that hand the state from one layer to the next: `for layer in "
    "self.layers: x = layer(x, ...)`"
)


class PendingState(torch.Tensor):
    """Stands for the state between two layers of a recorded loop, which nobody has computed.

    It has the state's shape, dtype and device, and refuses every operation.

    Attributes:
        after: the layer that would have returned it.
    """

    after: int

    @staticmethod
    def like(state: torch.Tensor, after: int) -> PendingState:
        pending = state.detach().as_subclass(PendingState)
        pending.after = after
        return pending

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = func.__self__.__name__
        if name in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        pending = next(a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, PendingState))
        raise ValueError(
            f"the model applies {name} to the state after layer {pending.after} of a layer-parallel stack, before the "
            f"stack's last layer; {_ADVICE}"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<the state after layer {self.after}, not computed yet>"


class UnusedOutput:
    """Stands for what a layer returns beside its state. A loop may carry it along, but not use it."""

    def __init__(self, layer: int, place: int) -> None:
        object.__setattr__(self, "_name", f"value {place + 1} that layer {layer} returns beside its state")

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"the model uses {self}; {_ADVICE}")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __getitem__ = __iter__ = __len__ = __bool__ = _refuse
    __call__ = __setattr__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python itself asks, as in copying
            raise AttributeError(name)
        self._refuse()

    def __repr__(self) -> str:
        return self.__dict__["_name"]


class LayerInLoop:
    """A layer of the stack as the model's loop sees it: called, it is recorded; all else is the layer's own.

    On a rank that does not hold the layer it has the layer's attributes, with parameters that have no values.
    """

    def __init__(self, layer: nn.Module, record: Callable[[tuple, dict[str, Any]], Any]) -> None:
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_record", record)

    @not_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._record(args, kwargs)

    forward = __call__

    @property  # type: ignore[misc]  # as unittest.mock does, so that isinstance sees the layer's class
    def __class__(self) -> type:
        return type(self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._layer, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._layer, name)

    def __getitem__(self, index: Any) -> Any:
        return self._layer[index]

    def __repr__(self) -> str:
        return repr(self._layer)


class RecordedLoop:
    """The calls of one pass of a model's loop, in the order of the layers.

    Args:
        layers: how many there are.

    Attributes:
        calls: arguments without the state, one for each layer called so far.
        state: the state before the first layer.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.calls: list[Call] = []
        self.state: Any = None
        self._expected: Any = None

    def add(self, layer: int, state: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes the call of a layer.

        Raises:
            ValueError: the layer is not the next one, its state is not what the layer before handed on, or something
                that has not been computed is among its arguments.
        """
        if layer != len(self.calls):
            missing = f"layer {len(self.calls)}" if layer > len(self.calls) else "the first layer again"
            raise ValueError(
                f"the model calls layer {layer} of a layer-parallel stack where {missing} would be next: it leaves "
                f"layers out (layerdrop, early exit), repeats them or changes their order; {_ADVICE}"
            )
        for argument in pytree.tree_leaves((args, kwargs)):
            if isinstance(argument, PendingState):
                raise ValueError(
                    f"the model gives layer {layer} the state after layer {argument.after} a second time, as an "
                    f"argument; {_ADVICE}"
                )
            if isinstance(argument, UnusedOutput):
                raise ValueError(f"the model gives layer {layer} {argument}; {_ADVICE}")
        if layer == 0:
            self.state = state
        elif not _is_handed_on(state, self._expected):
            raise ValueError(
                f"the model changes the state between layer {layer - 1} and layer {layer} of a layer-parallel stack; "
                f"{_ADVICE}"
            )
        self.calls.append((args, kwargs))

    @property
    def complete(self) -> bool:
        return len(self.calls) == self.layers

    def pending(self) -> Any:
        """What stands for the state after the layer called last: tensor or tuple, as the state before the first."""
        after = len(self.calls) - 1
        single = isinstance(self.state, torch.Tensor)
        parts = tuple(PendingState.like(t, after) for t in ((self.state,) if single else self.state))
        self._expected = parts[0] if single else parts
        return self._expected


def _is_handed_on(state: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return isinstance(state, tuple | list) and [*map(id, state)] == [*map(id, expected)]
    return state is expected
