"""A layer-parallel stack in the place of a model's list of layers."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import nn

from ..layers.arguments import joined
from ..mgrit.options import MGRIT
from ..nn import BlockStack
from ..parallel.compiled import not_compiled
from ..parallel.layer_parallel import LayerParallel
from .recorded_loop import LayerInLoop, RecordedLoop, UnusedOutput

_CACHE = (
    "keys and values cannot be cached in a layer-parallel stack, whose layers are evaluated several times on several "
    "ranks; pass use_cache=False, also to generate()"
)
REMEDIES = {
    "use_cache": _CACHE,
    "past_key_values": _CACHE,
    "past_key_value": _CACHE,
    "layer_past": _CACHE,
    "output_attentions": "a layer-parallel stack passes on its layers' state alone; pass output_attentions=False",
    "output_hidden_states": "the states between layers lie on many ranks and are not collected; pass "
    "output_hidden_states=False, or take them from the model before it is parallelized",
    "output_router_logits": "what the layers' routers return is not collected from the ranks, so the auxiliary loss "
    "would be wrong; pass output_router_logits=False",
}
_MOST_OUTPUTS = 16  # values that a layer may return


def refuse(arguments: dict[str, Any]) -> None:
    """Raises a ValueError for an argument that asks for what a layer-parallel stack cannot give."""
    for name, remedy in REMEDIES.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            shown = value if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
            raise ValueError(f"{name} = {shown}: {remedy}")


class LoopedStack(LayerParallel):
    """What a model's own ``for layer in self.layers: x = layer(x, ...)`` loops over, each layer with its own arguments.

    The loop runs whole: its calls are recorded, and the last one solves and returns what the last layer would, a tensor
    or a tuple that starts with it. See :mod:`mlpint.hf.recorded_loop` for what a loop may do with the state. Called
    itself, the stack calls every layer with the same arguments. ``stack[n]`` is layer n as the loop sees it.

    Raises:
        ValueError: on a loop that does more than to hand the state on, or a call that asks for cached keys and values,
            attentions, hidden states or router logits.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        options: MGRIT | None = None,
        *,
        evaluated: BlockStack | None = None,
        **kwargs: Any,
    ) -> None:
        layers = list(layers)
        super().__init__(layers if evaluated is None else evaluated, options, **kwargs)
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = inspect.signature(layers[0].forward).parameters.values()
        self._argument_names = [p.name for p in parameters if p.kind in kinds]
        self._outlines = {n: outline(layer) for n, layer in enumerate(layers) if n not in self.local_layers}
        self._loop: RecordedLoop | None = None
        # Of a tuple that starts with the state, for each further entry whether it is None; None until it is known.
        self._further: list[bool] | None = None
        self._returns_tensor = True
        for layer in self.local_layers.values():
            layer.register_forward_hook(self._check_form)

    @not_compiled
    def __iter__(self) -> Iterator[LayerInLoop]:
        return (self[n] for n in range(len(self)))

    @not_compiled
    def __getitem__(self, index: int | slice) -> Any:
        """A layer, or several, as the model's loop sees them."""
        if isinstance(index, slice):
            return [self[n] for n in range(len(self))[index]]
        n = range(len(self))[index]
        layer = self.local_layers.get(n)
        return LayerInLoop(self._outlines[n] if layer is None else layer, functools.partial(self._called, n))

    def train(self, mode: bool = True) -> Self:
        for layer in self._outlines.values():
            layer.train(mode)
        return super().train(mode)

    @not_compiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The state after the last layer, in the form in which a layer returns it; see :class:`LayerParallel`."""
        state, args, kwargs = self._split(args, kwargs)
        self._find_form(state, args, kwargs)
        return self._returned(self._solve(state, args, kwargs), len(self) - 1)

    @not_compiled
    def _called(self, n: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Layer n is called by the model's loop."""
        state, args, kwargs = self._split(args, kwargs)
        if n == 0:
            self._loop = RecordedLoop(len(self))
        loop = self._loop
        if loop is None:
            raise ValueError(
                f"layer {n} of a layer-parallel stack is called by itself: the layers run as one, beginning with the "
                "first; let the model's forward loop over all of them"
            )
        loop.add(n, state, args, kwargs)
        if n == 0:
            self._find_form(state, args, kwargs)
        if not loop.complete:
            return self._returned(loop.pending(), n)
        self._loop = None
        args, kwargs = joined(loop.calls)
        return self._returned(self._solve(loop.state, args, kwargs), n)

    def _solve(self, state: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The state after the last layer; the arguments are those of layers."""
        return super().forward(state, *args, **kwargs)

    def _split(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
        """The state and the other arguments of a call."""
        refuse(dict(zip(self._argument_names, args, strict=False)) | kwargs)
        if args:
            return args[0], args[1:], kwargs
        if not self._argument_names or self._argument_names[0] not in kwargs:
            raise TypeError("a layer of a layer-parallel stack was called without its state")
        return kwargs[self._argument_names[0]], (), {k: v for k, v in kwargs.items() if k != self._argument_names[0]}

    # --- the form in which layers return their state -----------------------------------------------------------------

    def _find_form(self, state: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Evaluates the first layer once, in the first call of all, to see what it returns. Collective."""
        if self._further is not None or not isinstance(state, torch.Tensor):
            return
        form = torch.full((_MOST_OUTPUTS,), -1)  # per entry beside the state: -1 there is none, 0 a value, 1 None
        kind = torch.zeros(1, dtype=torch.int64)  # 1: a tensor, 2: a tuple
        first = self._first_layer(state)
        if first is not None:
            with torch.no_grad(), self.layer_random.preserved(state.device):
                output = first(state, *args, **kwargs)
            kind[0] = 1 if isinstance(output, torch.Tensor) else 2 if isinstance(output, tuple | list) else 0
            if isinstance(output, tuple | list):
                for i, value in enumerate(output[1 : 1 + _MOST_OUTPUTS]):
                    form[i] = int(value is None)
        self.comm.broadcast(form, self.layout.first_rank)
        self.comm.broadcast(kind, self.layout.first_rank)
        if not int(kind):
            raise ValueError(
                "the layers of a layer-parallel stack must return their state, or a tuple that starts with it"
            )
        self._returns_tensor = int(kind) == 1
        self._further = [bool(entry) for entry in form.tolist() if entry >= 0]

    def _first_layer(self, state: torch.Tensor) -> nn.Module | None:
        """The first layer, on the rank that has it."""
        return self.local_layers.get(0)

    def _returned(self, state: Any, layer: int) -> Any:
        """What a layer returns that makes this state."""
        if self._returns_tensor or not isinstance(state, torch.Tensor):
            return state
        further = self._further or []
        return (state, *(None if is_none else UnusedOutput(layer, i) for i, is_none in enumerate(further)))

    def _check_form(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._further is None or not isinstance(output, tuple | list) or self._returns_tensor:
            return
        if len(output) != 1 + len(self._further):
            raise ValueError(
                f"{type(layer).__name__} returned {len(output)} values and the first layer {1 + len(self._further)}: "
                "the layers of a layer-parallel stack must return their state in the same form"
            )


def outline(module: nn.Module) -> nn.Module:
    """A module with the attributes of another, no hooks, and parameters and buffers without memory."""
    copied = copy.copy(module)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            copied.__dict__[name] = type(value)()
    copied._parameters = {
        n: p if p is None else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for n, p in module._parameters.items()
    }
    copied._buffers = {n: b if b is None else b.to("meta") for n, b in module._buffers.items()}
    copied._modules = {n: m if m is None else outline(m) for n, m in module._modules.items()}
    return copied
