"""Stacks whose first layer holds a position bias for all of them: T5's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..mgrit.options import MGRIT
from .looped_stack import LoopedStack, outline

BIAS_TABLE = ("layer", "0", "SelfAttention", "relative_attention_bias")  # of the table in the first layer


def hands_on_a_bias(layer: nn.Module) -> bool:
    """Whether a first layer hands its bias on as T5's do: its self-attention makes one, and takes one it is given."""
    return getattr(_attention(layer), "has_relative_attention_bias", False) is True


def _attention(layer: nn.Module) -> nn.Module | None:
    parts = getattr(layer, "layer", None)
    return getattr(parts[0], "SelfAttention", None) if isinstance(parts, nn.ModuleList) and len(parts) else None


class BiasedStack(LoopedStack):
    """T5's layers (Raffel et al., 2020). The attention scores of all have one bias by relative position in common; the
    first layer holds its table and hands the bias on beside its state.

    Here every rank makes the bias, from a replica of the table, and gives it to the layers as an argument. Its gradient
    is summed over the ranks, so that all replicas get the same and stay equal.

    Args:
        layers: so that :func:`hands_on_a_bias` of the first.
    """

    def __init__(self, layers: Iterable[nn.Module], options: MGRIT | None = None, **kwargs: Any) -> None:
        layers = list(layers)
        attention: Any = _attention(layers[0])
        self_made: Any = outline(attention)  # makes the bias without being anyone's layer
        table = self_made._modules["relative_attention_bias"] = attention.relative_attention_bias
        super().__init__(layers, options, **kwargs)
        self._maker = (self_made,)  # in a tuple, so as not to be a submodule
        if 0 not in self.local_layers:
            self.add_module("0", _Path(BIAS_TABLE, table))
        self._bias: torch.Tensor | None = None  # of the pass under way
        # Before transformers 5, which scales in the open, layers without an attention to the encoder had no bias of it
        # to return, and a bias that they were given had to bring the mask with it.
        self._bias_has_mask = not hasattr(attention, "scaling")
        biases = 1 if self._bias_has_mask and not attention.is_decoder else 2
        self._returns_tensor, self._further = False, [False] * biases

    def _split(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
        """As the layers are called, but that each is given the bias; what those before it handed on is left out."""
        state, args, kwargs = super()._split(args, kwargs)
        named = dict(zip(self._argument_names[1:], args, strict=False)) | kwargs
        if isinstance(named.get("position_bias"), torch.Tensor):
            self._bias = named["position_bias"]
        elif named.get("position_bias") is None:  # the first layer's call
            length = state.shape[1]
            self._bias = self._maker[0].compute_bias(length, length, device=state.device)
            if self._bias_has_mask and named.get("attention_mask") is not None:
                self._bias = self._bias + named["attention_mask"][..., :length]
        named["position_bias"], named["encoder_decoder_position_bias"] = self._bias, None
        return state, (), named

    @property
    def shared_parameters(self) -> list[tuple[nn.Parameter, list[int]]]:
        first = self.layout.first_rank
        holders = [first, *(r for r in range(self.comm.size) if r != first)]
        table = [(self._maker[0].relative_attention_bias.weight, holders)] if len(holders) > 1 else []
        return [*super().shared_parameters, *table]


class _Path(nn.Module):
    """Leads to a replica of a part of another rank's layer, by the name that it has there."""

    def __init__(self, names: Iterable[str], end: nn.Module) -> None:
        super().__init__()
        name, *rest = names
        self.add_module(name, _Path(rest, end) if rest else end)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing is here; the layer's other entries are its owner's."""
