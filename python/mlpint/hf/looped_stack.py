"""A layer-parallel stack in the place of a model's list of layers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from ..mgrit.options import MGRIT
from ..parallel.layer_parallel import LayerParallel

_CACHE = (
    "keys and values cannot be cached in a layer-parallel stack, whose layers are evaluated several times on several "
    "ranks; pass use_cache=False, also to generate()"
)
_HEAD_MASK = "masks that differ from layer to layer cannot be passed through a layer-parallel stack; leave it out"
REMEDIES = {
    "use_cache": _CACHE,
    "past_key_values": _CACHE,
    "past_key_value": _CACHE,
    "layer_past": _CACHE,
    "head_mask": _HEAD_MASK,
    "layer_head_mask": _HEAD_MASK,
    "output_attentions": "a layer-parallel stack passes on its layers' state alone; pass output_attentions=False",
    "output_hidden_states": "the states between layers lie on many ranks and are not collected; pass "
    "output_hidden_states=False, or take them from the model before it is parallelized",
}


def refuse(arguments: dict[str, Any]) -> None:
    """Raises a ValueError for an argument that asks for what a layer-parallel stack cannot give."""
    for name, remedy in REMEDIES.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            shown = value if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
            raise ValueError(f"{name} = {shown}: {remedy}")


class LoopedStack(LayerParallel):
    """What a model's own ``for layer in self.layers: x = layer(x, *args, **kwargs)`` loops over: one callable, itself.

    It returns what one layer would: a tensor, or a tuple that starts with it and holds None otherwise. ``len`` is the
    number of layers and the slice of all layers the stack. ``stack[n]`` has the attributes of layer n (configuration,
    shapes) but neither its values nor its forward, since the layer may be another rank's.

    Raises:
        ValueError: on a call that asks for cached keys and values, attentions or hidden states, or if the layers return
            tensors beside their state.
    """

    def __init__(self, layers: Iterable[nn.Module], options: MGRIT | None = None, **kwargs: Any) -> None:
        layers = list(layers)
        super().__init__(layers, options, **kwargs)
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = inspect.signature(layers[0].forward).parameters.values()
        self._argument_names = [p.name for p in parameters if p.kind in kinds]
        self._outlines = [outline(layer) for layer in layers]
        for layer in self._outlines:
            layer.forward = _refuse_single_call
        self._single = True
        self._form = 0  # entries of the tuple that layers return; 0: a tensor
        for layer in self.local_layers.values():
            layer.register_forward_hook(self._note_form)

    def __iter__(self) -> Iterator[LoopedStack]:
        yield self

    def __getitem__(self, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            numbers = range(len(self))
            if numbers[index] != numbers:
                raise ValueError(
                    f"{numbers[index]} is a part of the {len(self)} layers of a layer-parallel stack, which run as "
                    "one; give the parts lists of their own in the model, and parallelize one with stack=..."
                )
            return self
        return self._outlines[index]

    def train(self, mode: bool = True) -> LoopedStack:
        for layer in self._outlines:
            layer.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The state after the last layer, in the form in which a layer returns it; see :class:`LayerParallel`."""
        refuse(dict(zip(self._argument_names, args, strict=False)) | kwargs)
        if not args and self._argument_names and self._argument_names[0] in kwargs:
            args = (kwargs.pop(self._argument_names[0]),)
        self._single = bool(args) and isinstance(args[0], torch.Tensor)
        y = super().forward(*args, **kwargs)
        if self.layout.idle_ranks:  # they have seen no layer return anything
            self._form = int(self.comm.broadcast(torch.tensor([self._form]), self.layout.first_rank))
        return (y, *[None] * (self._form - 1)) if self._form else y

    def _note_form(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not self._single or not isinstance(output, tuple | list):
            self._form = 0
            return
        if any(o is not None for o in output[1:]):
            raise ValueError(
                f"{type(layer).__name__} returned {len(output)} values, but a layer-parallel stack passes on the first "
                "alone, the state; let the layers return the state, or take and return a tuple of all that they pass on"
            )
        self._form = len(output)


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


def _refuse_single_call(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "the layers of a layer-parallel stack cannot be called one by one: let the model's forward say "
        "`for layer in self.layers: x = layer(x)`, which runs them all, or call the stack"
    )
