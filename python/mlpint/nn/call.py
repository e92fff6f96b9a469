"""What one call of a step is given beside weights and state, and the parts of a step that depend on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import attention as attn
from . import dropout, ops
from .settings import Settings, Weights


class Call:
    """Settings, step size, padding and dropout keys of one evaluation of J blocks.

    Args:
        settings: of the blocks.
        batch: rows of the batch; M = batch x sequence.
        padding: key lengths, if there are any.
        keys: J dropout keys; None where nothing is dropped.
        h: step size in all.
    """

    def __init__(
        self,
        settings: Settings,
        batch: int,
        padding: attn.Padding | None,
        keys: Sequence[int] | None,
        h: float,
    ) -> None:
        self.settings, self.batch, self.padding, self.h = settings, batch, padding, h
        self.keys = keys
        self.eps = settings.eps
        self.activation = "gelu_tanh" if settings.gelu == "tanh" else "gelu"
        self.drops = keys is not None and settings.dropout > 0
        self._drops_attention = keys is not None and settings.attention_dropout > 0
        self._shape = (batch, settings.heads, settings.causal, padding, settings.scale)

    def dropped(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """x, or its gradient, behind the dropout of a residual increment."""
        return dropout.dropped(x, self.keys, place, self.settings.dropout)

    def onto_stream(
        self,
        a: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        y: torch.Tensor,
        x: torch.Tensor,
        h: float,
        place: int,
    ) -> torch.Tensor:
        """x + h ((y - x) + drop(a W^T + b))."""
        if not self.drops:
            return ops.linear_axpy(a, weight, bias, y, x, h)
        return ops.residual_add(self.dropped(ops.linear(a, weight, bias), place), y, x, h)

    def attention(self, qkv: torch.Tensor) -> torch.Tensor:
        if self._drops_attention:
            return self.attention_train(qkv)[0]
        return attn.attention(qkv, *self._shape)

    def attention_train(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._drops_attention:
            return attn.dropout_attention(qkv, *self._shape, self.keys, self.settings.attention_dropout)
        return attn.attention_train(qkv, *self._shape)

    def attention_backward(
        self, grad: torch.Tensor, qkv: torch.Tensor, o: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        if self._drops_attention:
            s = self.settings
            return attn.dropout_attention_backward(
                grad, qkv, attended, self.batch, s.heads, self.padding, s.scale, self.keys, s.attention_dropout
            )
        return attn.attention_backward(grad, qkv, o, attended, *self._shape)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast is on for; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def for_products(w: Weights, dtype: torch.dtype | None) -> Weights:
    """Weights whose matrices and their biases have the dtype that products are to be taken in."""
    if dtype is None:
        return w
    return Weights(*(t if name.startswith("ln") else t.to(dtype) for name, t in zip(Weights._fields, w, strict=True)))
