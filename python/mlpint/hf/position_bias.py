"""Stacks whose first layer holds a position bias for all of them: T5's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..mgrit.options import MGRIT
from .looped_stack import LoopedStack, outline

_PLACE = ("layer", "0", "SelfAttention", "relative_attention_bias")  # of the table in the first layer


def hands_on_a_bias(layer: nn.Module) -> bool:
    """Whether a first layer hands its bias on as T5's do: its self-attention makes one, and takes one it is given."""
    attention = _attention(layer)
    # Before transformers 5, which scales in the open, a bias that was given had to bring the mask with it.
    return getattr(attention, "has_relative_attention_bias", False) is True and hasattr(attention, "scaling")


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
        attention = _attention(layers[0])
        self_made = outline(attention)  # makes the bias without being anyone's layer
        table = self_made._modules["relative_attention_bias"] = attention.relative_attention_bias
        super().__init__(layers, options, **kwargs)
        self._maker = (self_made,)  # in a tuple, so as not to be a submodule
        if 0 not in self.local_layers:
            self.add_module("0", _Path(_PLACE, table))
        self._form = 3  # the state and the biases of both attentions

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None, None]:
        """As the layers': the state after the last of them, and no biases."""
        if position_bias is None:
            length = hidden_states.shape[1]
            position_bias = self._maker[0].compute_bias(length, length, device=hidden_states.device)
        return super().forward(hidden_states, attention_mask, position_bias, *args, **kwargs)

    @property
    def shared_parameters(self) -> list[tuple[nn.Parameter, list[int]]]:
        first = self.layout.first_rank
        holders = [first, *(r for r in range(self.comm.size) if r != first)]
        table = [(self._maker[0].relative_attention_bias.weight, holders)] if len(holders) > 1 else []
        return [*super().shared_parameters, *table]

    def _note_form(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, tuple) or len(output) != 3:
            raise ValueError(f"{type(layer).__name__} must return its state and two position biases, as T5's layers do")


class _Path(nn.Module):
    """Leads to a replica of a part of another rank's layer, by the name that it has there."""

    def __init__(self, names: Iterable[str], end: nn.Module) -> None:
        super().__init__()
        name, *rest = names
        self.add_module(name, _Path(rest, end) if rest else end)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing is here; the layer's other entries are its owner's."""
