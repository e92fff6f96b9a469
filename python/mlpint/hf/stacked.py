"""Layers of the transformers library as blocks with stacked parameters, in the place of the model's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..layers.arguments import PerLayer
from ..nn import BlockStack
from ..nn.convert import pieces_of, settings_of, stack_of
from .families import pretrained_models
from .looped_stack import REMEDIES, LoopedStack

# Arguments that say nothing new to a layer which is given its mask and its rotation, are passed on for the loss, or
# have been refused where they ask for anything.
_OF_NO_CONCERN = {"position_ids", "cache_position", "return_dict", "num_items_in_batch", *REMEDIES}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StackedLoop(LoopedStack):
    """As :class:`LoopedStack`, its layers ``evaluated`` as a :class:`mlpint.nn.BlockStack` that computes the same."""

    @property
    def gradient_checkpointing(self) -> bool:
        """What the library's ``gradient_checkpointing_enable`` sets: layers are evaluated again for their gradients."""
        return self.conditions.recompute

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._change(recompute=value)

    def _solve(self, state: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self._argument_names[1:], args, strict=False)) | kwargs
        mask, rotation = given.pop("attention_mask", None), given.pop("position_embeddings", None)
        left = [name for name, value in given.items() if value is not None and name not in _OF_NO_CONCERN]
        if left or isinstance(rotation, PerLayer):
            raise ValueError(
                f"stacked layers cannot be given {', '.join(left) or 'positions by layer'}: parallelize the model with "
                "stacked=False"
            )
        more: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if rotation is not None:
            # Both halves of a head's channels turn alike.
            more["rotation"] = tuple(table[..., : table.shape[-1] // 2] for table in rotation)
        return super()._solve(state, (), more)

    def _first_layer(self, state: torch.Tensor) -> nn.Module | None:
        """A layer with any weights at all: what it returns has the form that the model's had."""
        if self.comm.rank != self.layout.first_rank:
            return None
        return copy.deepcopy(self._outlines[0]).to_empty(device=state.device)


def as_blocks(model: nn.Module, path: str) -> BlockStack:
    """The layers of a model's stack, given by its name, as blocks with copies of their weights.

    Raises:
        ValueError: says why they are not the same.
    """
    layers = list(model.get_submodule(path).children())
    config, attends_by = _configuration(model, path)
    if config is None:
        raise ValueError("it is no model of the transformers library")
    if any(p.is_meta for layer in layers for p in layer.parameters()):
        raise ValueError("this rank has only some of the layers in memory")
    if attends_by not in ("eager", "sdpa"):
        raise ValueError(f"attn_implementation = {attends_by!r}: blocks go by what 'sdpa' and 'eager' are told")
    settings = settings_of(layers[0], config)
    named = {piece.name: piece for piece in pieces_of(layers[0], settings)}
    first = dict(layers[0].named_parameters())
    of_field: dict[str, tuple[Any, ...]] = {}
    seen: set[nn.Parameter] = set()
    for n, layer in enumerate(layers):
        _check_modules(n, layer, {settings.dropout, settings.attention_dropout})
        parameters = dict(layer.named_parameters())
        if set(parameters) != set(named) or set(layer.state_dict()) != set(named):
            others = sorted({*parameters, *layer.state_dict()} ^ set(named))
            raise ValueError(f"layer {n} has other parameters than its kind: {', '.join(others[:3])}")
        for name, p in parameters.items():
            kind = p.dtype, p.device, p.requires_grad
            if of_field.setdefault(named[name].field, kind) != kind:
                raise ValueError(
                    f"{name} of layer {n} has another dtype, device or requires_grad than {named[name].field} elsewhere"
                )
            if p.dtype != next(iter(first.values())).dtype:
                raise ValueError(f"{name} is {p.dtype}, and other parameters of the layer are not")
            if p in seen:
                raise ValueError(f"{name} of layer {n} is a parameter of another layer, too")
            seen.add(p)
    blocks = stack_of(layers, config)
    blocks.pieces = tuple(named[name] for name in first)  # in the order in which the layers have them
    for field, (_, _, requires_grad) in of_field.items():
        getattr(blocks, field).requires_grad_(requires_grad)
    return blocks


def _configuration(model: nn.Module, path: str) -> tuple[Any, str]:
    """Of the innermost model of the library that the stack is a part of: the configuration, the kind of attention."""
    parts = pretrained_models(model)
    around = [name for name in parts if not name or path.startswith(f"{name}.")]
    if not around:
        return None, ""
    config: Any = parts[max(around, key=len)].config
    return config, getattr(config, "_attn_implementation", None) or "eager"


def _check_modules(n: int, layer: nn.Module, probabilities: set[float]) -> None:
    for name, module in layer.named_modules():
        where = f"layer {n}{'.' if name else ''}{name}"
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            raise ValueError(f"{where} has hooks")
        if "forward" in vars(module):
            raise ValueError(f"{where} has another forward than its class")
        library = type(module).__module__.split(".")[0] in ("transformers", "torch")
        if not library or isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise ValueError(f"{where} is a {type(module).__name__}")
        if isinstance(module, nn.Dropout) and module.p not in probabilities:
            raise ValueError(f"{where} drops {module.p}, and the configuration says {sorted(probabilities)}")
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError(f"{where} has gradient checkpointing on; enable it afterwards, or pass recompute=True")
        if module.training != layer.training:
            raise ValueError(f"{where} is in another mode than the layer")
