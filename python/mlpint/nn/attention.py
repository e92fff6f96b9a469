"""Softmax attention of J independent layers over one batch, and its backward; see ops.py for the conventions."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from ..kernels.dispatch import WIDEST_HEAD
from . import fused_attention
from .attending import Attending, masked
from .dropout import Dropout
from .kernels import dropout_kernels, kernel, recorded


def split_heads(qkv: torch.Tensor, batch: int, heads: int, parts: int = 3) -> Sequence[torch.Tensor]:
    """The q, k, v [J B, H, T, hd] as views of [J, B T, 3 D], or of a copy where layers are strided and B > 1; or as
    many of them as there are parts."""
    j, m, width = qkv.shape
    return qkv.reshape(j * batch, m // batch, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)


def attention(qkv: torch.Tensor, to: Attending) -> torch.Tensor:
    """Softmax attention [J, B T, 3 D] -> [J, B T, D], with nothing saved. Tokens that see none get 0."""
    module = _kernel("attention", qkv, to, len(qkv))
    if module:
        return _tokens(module.attention(*_per_layer(qkv, to), to.causal, _lengths(to), to.scale))
    q, k, v = split_heads(qkv, to.batch, to.heads)
    bias, causal = to.mask(qkv)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=to.scale)
    return _merged(o, len(qkv), to)


def attention_train(qkv: torch.Tensor, to: Attending) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of :func:`attention`, and what its backward needs beside that and qkv: the log-sum-exp [J, B, H, T]
    (or longer, see :mod:`.fused_attention`); nothing, [J, 0], where the backward has to evaluate again."""
    module = _kernel("attention", qkv, to, len(qkv))
    if module:
        o, lse = module.attention_train(*_per_layer(qkv, to), to.causal, _lengths(to), to.scale)
        return _tokens(o), lse
    q, k, v = split_heads(qkv, to.batch, to.heads)
    bias, causal = to.mask(qkv)
    operation = fused_attention.chosen(q, k, v, bias, causal)
    if operation is None:
        return attention(qkv, to), qkv.new_empty(len(qkv), 0)
    o, lse = operation.forward(q, k, v, bias, causal, to.scale)
    return _merged(o, len(qkv), to), lse.view(len(qkv), to.batch, *lse.shape[1:])


def attention_backward(
    grad: torch.Tensor, qkv: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, to: Attending
) -> torch.Tensor:
    """The gradient for qkv, [J, B T, 3 D], from that for the output, [J, B T, D].

    Whoever computed the log-sum-exp, kernel or torch, either can go on with it.
    """
    j, m, d = o.shape
    batch, heads, sequence = to.batch, to.heads, m // to.batch
    module = _kernel("attention_backward", qkv, to, j) if lse.numel() else None
    if module:
        return _backward_by(module, grad, qkv, o, lse[..., :sequence].contiguous(), to)
    bias, causal = to.mask(qkv)
    grad = _split_output(to.clear(grad.to(qkv.dtype).view(j, batch, sequence, d)), heads)
    q, k, v = split_heads(qkv, batch, heads)
    operation = fused_attention.chosen(q, k, v, bias, causal) if lse.numel() else None
    if operation is None:
        gradients = fused_attention.backward_again(grad, q, k, v, bias, causal, to.scale)
    else:
        if to.padding is not None:  # of queries that see none the kernel's is 0, from which exponentials could overflow
            hidden = to.padding.padded[:, None]  # [B, 1, T]
            lse = lse[..., :sequence].masked_fill(hidden, -masked(lse.dtype))
        o = _split_output(o.view(j, batch, sequence, d), heads)
        gradients = operation.backward(grad, q, k, v, o, lse.flatten(0, 1), bias, causal, to.scale)
    return _packed(gradients, qkv)


def dropout_attention(qkv: torch.Tensor, to: Attending, dropout: Dropout) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with dropout of its weights: the output, and what its backward needs: the log-sum-exp [J, B, H, T]
    where the kernel is taken, else the weights before dropout, [J, B, H, T, T]. Differentiable."""
    # Where a kernel can thin the weights there is nothing in torch to be faster than it.
    fits = to.by_lengths and qkv.shape[2] // 3 // to.heads <= WIDEST_HEAD
    if fits and not recorded(qkv) and dropout_kernels(qkv.device):
        module = importlib.import_module("..kernels.attention", __package__)
        o, lse = module.attention_train(
            *_per_layer(qkv, to), to.causal, _lengths(to), to.scale, *_dropping(dropout, qkv)
        )
        return _tokens(o), lse
    q, k, v = split_heads(qkv, to.batch, to.heads)
    bias, causal = to.mask(qkv)
    o, weights = thinned_attention(q, k, v, bias, causal, to.scale, dropout)
    return _merged(o, len(qkv), to), weights


def dropout_attention_backward(
    grad: torch.Tensor, qkv: torch.Tensor, o: torch.Tensor, attended: torch.Tensor, to: Attending, dropout: Dropout
) -> torch.Tensor:
    """The gradient for qkv of :func:`dropout_attention`."""
    if attended.dim() == 4:
        module = importlib.import_module("..kernels.attention", __package__)
        return _backward_by(module, grad, qkv, o, attended, to, *_dropping(dropout, qkv))
    j, m, _ = qkv.shape
    q, k, v = split_heads(qkv, to.batch, to.heads)
    grad = _split_output(to.clear(grad.to(qkv.dtype).view(j, to.batch, m // to.batch, -1)), to.heads)
    return _packed(thinned_attention_backward(grad, q, k, v, attended, to.scale, dropout), qkv)


def thinned_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout: Dropout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of q [J B, H, T, hd], k and v [J B, H, S, hd]: the output like q, and the weights before dropout, [J, B, ...]."""
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(_above_diagonal(scores), -torch.inf)
    weights = torch.softmax(scores, -1)
    weights = weights.view(len(dropout.keys), -1, *weights.shape[1:])
    return torch.matmul(dropout(weights).flatten(0, 1), v), weights


def thinned_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    dropout: Dropout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients for q, k and v from that for the output of :func:`thinned_attention`."""
    factors = dropout.factors(weights.shape[1:], weights.dtype, weights.device)
    dv = torch.matmul((weights * factors).flatten(0, 1).transpose(-1, -2), grad)
    dweights = torch.matmul(grad, v.transpose(-1, -2)).view_as(weights).mul_(factors)
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).flatten(0, 1).mul_(scale)
    return torch.matmul(dscores, k), torch.matmul(dscores.transpose(-1, -2), q), dv


def _dropping(dropout: Dropout, qkv: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """As attention's kernels take it."""
    return dropout.seeds(qkv.device), dropout.place, dropout.levels


def _backward_by(
    module: ModuleType,
    grad: torch.Tensor,
    qkv: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    to: Attending,
    *dropping: Any,
) -> torch.Tensor:
    """The gradient for qkv by the kernels; lse [J, B, H, T]."""
    j, m, d = o.shape
    do, o = (t.view(j, to.batch, m // to.batch, to.heads, d // to.heads).transpose(2, 3) for t in (grad.to(o.dtype), o))
    given = to.causal, _lengths(to), to.scale, *dropping
    return module.attention_backward_packed(do, *_per_layer(qkv, to), o, lse, *given).view(j, m, 3 * d)


def _packed(gradients: Sequence[torch.Tensor], qkv: torch.Tensor) -> torch.Tensor:
    """Those for q, k and v [J B, H, T, hd] as the one for qkv."""
    j, m, _ = qkv.shape
    return torch.cat([g.transpose(1, 2).reshape(j, m, -1) for g in gradients], -1)


def _kernel(op: str, qkv: torch.Tensor, to: Attending, j: int) -> ModuleType | None:
    if not to.by_lengths:
        return None
    _, m, width = qkv.shape
    head = max(16, 1 << (width // 3 // to.heads - 1).bit_length())  # the width of the kernel's tiles
    return kernel(op, head, m // to.batch, j * to.batch * to.heads, qkv)


def _per_layer(qkv: torch.Tensor, to: Attending) -> Sequence[torch.Tensor]:
    """The q, k, v as views [J, B, H, T, hd], as the kernels take them."""
    j, m, width = qkv.shape
    heads = qkv.view(j, to.batch, m // to.batch, 3, to.heads, width // 3 // to.heads)
    return heads.permute(3, 0, 1, 4, 2, 5).unbind(0)


def _tokens(o: torch.Tensor) -> torch.Tensor:
    """[J, B, H, T, hd] -> [J, B T, D]."""
    return o.transpose(2, 3).flatten(3).flatten(1, 2)


def _lengths(to: Attending) -> torch.Tensor | None:
    return None if to.padding is None else to.padding.lengths.to(torch.int32)


def _above_diagonal(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)


def _merged(o: torch.Tensor, j: int, to: Attending) -> torch.Tensor:
    """[J B, H, T, hd] -> [J, B T, D]."""
    batch, heads, sequence, width = o.shape
    return to.clear(o.transpose(1, 2).reshape(j, batch // j, sequence, heads * width)).flatten(1, 2)


def _split_output(o: torch.Tensor, heads: int) -> torch.Tensor:
    """[J, B, T, D] -> [J B, H, T, hd]."""
    j, batch, sequence, d = o.shape
    return o.reshape(j * batch, sequence, heads, d // heads).transpose(1, 2)
