"""Attention of J independent decoder layers to their memories, and its backward; see ops.py for the conventions.

Queries q are [J, B T, D], keys and values together kv [J, B S, 2 D].
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from . import fused_attention
from .attending import Padding
from .attention import split_heads, thinned_attention, thinned_attention_backward
from .dropout import Dropout


@dataclasses.dataclass(frozen=True, eq=False)
class Remembering:
    """What the attention to a memory is told beside queries, keys and values.

    Attributes:
        batch, heads: B and H.
        scale: factor of the scores.
        padding: how long the rows of the memory are. Where a row is of length 0, attention gives 0.
    """

    batch: int
    heads: int
    scale: float
    padding: Padding | None = None

    def bias(self, kv: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores, [J B, 1, 1, S]."""
        return None if self.padding is None else self.padding.bias(len(kv), kv.dtype)

    def clear(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x [J, B T, D] with zeros for the queries that see nothing."""
        if self.padding is None or self.padding.surely_none_empty:
            return x
        empty = (self.padding.lengths <= 0)[None, :, None, None]
        return x.view(len(x), self.batch, -1, x.shape[-1]).masked_fill(empty, 0).view_as(x)


def cross_attention(q: torch.Tensor, kv: torch.Tensor, to: Remembering) -> torch.Tensor:
    """Softmax attention, [J, B T, D], with nothing saved. Differentiable."""
    q4, k, v = _heads(q, kv, to)
    o = F.scaled_dot_product_attention(q4, k, v, attn_mask=to.bias(kv), scale=to.scale)
    return to.clear(_tokens(o, q))


def cross_attention_train(q: torch.Tensor, kv: torch.Tensor, to: Remembering) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of :func:`cross_attention`, and the log-sum-exp [J, B, H, T or more]; nothing, [J, 0], where the
    backward has to evaluate again."""
    q4, k, v = _heads(q, kv, to)
    bias = to.bias(kv)
    operation = fused_attention.chosen(q4, k, v, bias, False)
    if operation is None:
        return cross_attention(q, kv, to), q.new_empty(len(q), 0)
    o, lse = operation.forward(q4, k, v, bias, False, to.scale)
    return to.clear(_tokens(o, q)), lse.view(len(q), to.batch, *lse.shape[1:])


def cross_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, to: Remembering
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients for q and kv from that for the output."""
    q4, k, v = _heads(q, kv, to)
    bias = to.bias(kv)
    grad4, o4 = (split_heads(t, to.batch, to.heads, 1)[0] for t in (to.clear(grad.to(q.dtype)), o))
    operation = fused_attention.chosen(q4, k, v, bias, False) if lse.numel() else None
    if operation is None:
        gradients = fused_attention.backward_again(grad4, q4, k, v, bias, False, to.scale)
    else:
        gradients = operation.backward(grad4, q4, k, v, o4, lse.flatten(0, 1), bias, False, to.scale)
    return _merged(gradients, q, kv)


def dropout_cross_attention(
    q: torch.Tensor, kv: torch.Tensor, to: Remembering, dropout: Dropout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with dropout of its weights: the output, and the weights before dropout, [J, B, H, T, S]."""
    q4, k, v = _heads(q, kv, to)
    o, weights = thinned_attention(q4, k, v, to.bias(kv), False, to.scale, dropout)
    return to.clear(_tokens(o, q)), weights


def dropout_cross_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, weights: torch.Tensor, to: Remembering, dropout: Dropout
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients for q and kv of :func:`dropout_cross_attention`."""
    grad4 = split_heads(to.clear(grad.to(q.dtype)), to.batch, to.heads, 1)[0]
    q4, k, v = _heads(q, kv, to)
    return _merged(thinned_attention_backward(grad4, q4, k, v, weights, to.scale, dropout), q, kv)


def _heads(q: torch.Tensor, kv: torch.Tensor, to: Remembering) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[J B, H, T or S, hd] each."""
    k, v = split_heads(kv, to.batch, to.heads, 2)
    return split_heads(q, to.batch, to.heads, 1)[0], k, v


def _tokens(o: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[J B, H, T, hd] -> the shape of q."""
    return o.transpose(1, 2).reshape(q.shape)


def _merged(
    gradients: tuple[torch.Tensor, ...], q: torch.Tensor, kv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    of_q, of_k, of_v = gradients
    half = *kv.shape[:2], kv.shape[2] // 2
    return _tokens(of_q, q), torch.cat([g.transpose(1, 2).reshape(half) for g in (of_k, of_v)], -1)
