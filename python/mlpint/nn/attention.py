"""Softmax attention of J independent layers over one batch, and its backward; see ops.py for the conventions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch.nn import functional as F

from . import dropout
from .kernels import kernel

Windows = tuple[int, ...] | None


def _masked(dtype: torch.dtype) -> float:
    """What is added to scores of keys not to be seen: finite, twice too, so that a row without any key stays finite."""
    return max(-1e30, torch.finfo(dtype).min / 4)


class Padding:
    """Key lengths of one batch, in the forms that attention asks for."""

    def __init__(self, lengths: torch.Tensor, sequence: int) -> None:
        self.lengths = lengths
        positions = torch.arange(sequence, device=lengths.device)
        self.padded = positions >= lengths.unsqueeze(1)  # [B, T]
        self._biases: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def bias(self, j: int, dtype: torch.dtype) -> torch.Tensor:
        """The mask that is added to the scores of J batches, [J B, 1, 1, T]."""
        if (j, dtype) not in self._biases:
            bias = torch.zeros(self.padded.shape, dtype=dtype, device=self.padded.device)
            bias = bias.masked_fill_(self.padded, _masked(dtype))
            self._biases[j, dtype] = bias.repeat(j, 1)[:, None, None, :]
        return self._biases[j, dtype]

    def clear(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x [J, B, T, ...] with zeros where there is padding."""
        padded = self.padded.reshape(1, *self.padded.shape, *[1] * (x.dim() - 3))
        return x.masked_fill(padded, 0)


def split_heads(qkv: torch.Tensor, batch: int, heads: int) -> Sequence[torch.Tensor]:
    """The q, k, v [J B, H, T, hd] as views of [J, B T, 3 D], or of a copy where layers are strided and B > 1."""
    j, m, width = qkv.shape
    return qkv.reshape(j * batch, m // batch, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)


def attention(
    qkv: torch.Tensor,
    batch: int,
    heads: int,
    causal: bool,
    padding: Padding | None,
    scale: float,
    windows: Windows = None,
) -> torch.Tensor:
    """Softmax attention [J, B T, 3 D] -> [J, B T, D], with nothing saved. Padded queries give 0.

    ``windows``, one for each of the J layers: a token attends to those less than so many places away.
    """
    module = _kernel("attention", qkv, batch, heads, len(qkv)) if windows is None else None
    if module:
        return _tokens(module.attention(*_per_layer(qkv, batch, heads), causal, _lengths(padding), scale))
    q, k, v = split_heads(qkv, batch, heads)
    bias, causal = _mask(qkv, batch, causal, padding, windows)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return _merged(o, len(qkv), padding)


def attention_train(
    qkv: torch.Tensor,
    batch: int,
    heads: int,
    causal: bool,
    padding: Padding | None,
    scale: float,
    windows: Windows = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of :func:`attention`, and what its backward needs beside that and qkv: the log-sum-exp [J, B, H, T] on
    the CPU and where the kernels are taken; elsewhere nothing, [J, 0], since the backward evaluates it again."""
    if windows is None and _trains_by_kernels(qkv, batch, heads):
        from ..kernels.attention import attention_train as train

        o, lse = train(*_per_layer(qkv, batch, heads), causal, _lengths(padding), scale)
        return _tokens(o), lse
    if qkv.device.type != "cpu":
        return attention(qkv, batch, heads, causal, padding, scale, windows), qkv.new_empty(len(qkv), 0)
    q, k, v = split_heads(qkv, batch, heads)
    bias, causal = _mask(qkv, batch, causal, padding, windows)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return _merged(o, len(qkv), padding), lse.view(len(qkv), batch, *lse.shape[1:])


def attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    batch: int,
    heads: int,
    causal: bool,
    padding: Padding | None,
    scale: float,
    windows: Windows = None,
) -> torch.Tensor:
    """The gradient for qkv, [J, B T, 3 D], from that for the output, [J, B T, D]."""
    j, m, d = o.shape
    if windows is None and _trains_by_kernels(qkv, batch, heads):
        from ..kernels.attention_backward import attention_backward_packed

        do, o = (t.view(j, batch, m // batch, heads, d // heads).transpose(2, 3) for t in (grad.to(o.dtype), o))
        packed = attention_backward_packed(
            do, *_per_layer(qkv, batch, heads), o, lse.contiguous(), causal, _lengths(padding), scale
        )
        return packed.view(j, m, 3 * d)
    bias, causal = _mask(qkv, batch, causal, padding, windows)
    grad = _split_output(grad.to(qkv.dtype), batch, heads, padding)
    if qkv.device.type == "cpu":
        q, k, v = split_heads(qkv, batch, heads)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, _split_output(o, batch, heads, None), lse.flatten(0, 1), 0.0, causal,
            attn_mask=bias, scale=scale,
        )  # fmt: skip
        return torch.cat([g.transpose(1, 2).reshape(j, m, d) for g in gradients], -1)
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        q, k, v = split_heads(leaf, batch, heads)
        again = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return torch.autograd.grad(again, leaf, grad)[0]


def dropout_attention(
    qkv: torch.Tensor,
    keys: Sequence[int],
    probability: float,
    batch: int,
    heads: int,
    causal: bool,
    padding: Padding | None,
    scale: float,
    windows: Windows = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with dropout of its weights: the output, and the weights before dropout, [J, B, H, T, T]."""
    j = len(qkv)
    q, k, v = split_heads(qkv, batch, heads)
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    bias, causal = _mask(qkv, batch, causal, padding, windows)
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(_above_diagonal(scores), -torch.inf)
    weights = torch.softmax(scores, -1)
    weights = weights.view(j, batch, *weights.shape[1:])
    thinned = dropout.dropped(weights, keys, dropout.ATTENTION, probability)
    return _merged(torch.matmul(thinned.flatten(0, 1), v), j, padding), weights


def dropout_attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    weights: torch.Tensor,
    batch: int,
    heads: int,
    padding: Padding | None,
    scale: float,
    keys: Sequence[int],
    probability: float,
) -> torch.Tensor:
    """The gradient for qkv of :func:`dropout_attention`."""
    j, m, _ = qkv.shape
    q, k, v = split_heads(qkv, batch, heads)
    grad = _split_output(grad.to(qkv.dtype), batch, heads, padding)
    thinned = dropout.dropped(weights, keys, dropout.ATTENTION, probability).flatten(0, 1)
    dv = torch.matmul(thinned.transpose(-1, -2), grad)
    dweights = torch.matmul(grad, v.transpose(-1, -2)).view_as(weights)
    dweights = dropout.dropped(dweights, keys, dropout.ATTENTION, probability)
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).flatten(0, 1).mul_(scale)
    dq, dk = torch.matmul(dscores, k), torch.matmul(dscores.transpose(-1, -2), q)
    return torch.cat([g.transpose(1, 2).reshape(j, m, -1) for g in (dq, dk, dv)], -1)


def _kernel(op: str, qkv: torch.Tensor, batch: int, heads: int, j: int) -> ModuleType | None:
    _, m, width = qkv.shape
    head = max(16, 1 << (width // 3 // heads - 1).bit_length())  # the width of the kernel's tiles
    return kernel(op, head, m // batch, j * batch * heads, qkv)


def _trains_by_kernels(qkv: torch.Tensor, batch: int, heads: int) -> bool:
    """Whether both kernels are taken, whatever the number of layers: what one grouping of them saves another reads."""
    return all(_kernel(op, qkv, batch, heads, 1) for op in ("attention", "attention_backward"))


def _per_layer(qkv: torch.Tensor, batch: int, heads: int) -> Sequence[torch.Tensor]:
    """The q, k, v as views [J, B, H, T, hd], as the kernels take them."""
    j, m, width = qkv.shape
    return qkv.view(j, batch, m // batch, 3, heads, width // 3 // heads).permute(3, 0, 1, 4, 2, 5).unbind(0)


def _tokens(o: torch.Tensor) -> torch.Tensor:
    """[J, B, H, T, hd] -> [J, B T, D]."""
    return o.transpose(2, 3).flatten(3).flatten(1, 2)


def _lengths(padding: Padding | None) -> torch.Tensor | None:
    return None if padding is None else padding.lengths.to(torch.int32)


def _mask(
    qkv: torch.Tensor, batch: int, causal: bool, padding: Padding | None, windows: Windows
) -> tuple[torch.Tensor | None, bool]:
    """What is added to the scores of J batches, broadcast to [J B, H, T, T], and whether causality comes on top."""
    j, m, _ = qkv.shape
    # Under a causal mask padded queries alone see padded keys, and their output is cleared.
    bias = None if causal or padding is None else padding.bias(j, qkv.dtype)
    if windows is None:
        return bias, causal
    inside = _window_bias(windows, causal, m // batch, qkv.dtype, qkv.device)
    inside = inside[:, None, None].expand(-1, batch, -1, -1, -1).flatten(0, 1)
    return inside if bias is None else inside + bias, False


@functools.lru_cache(maxsize=64)
def _window_bias(
    windows: tuple[int, ...], causal: bool, sequence: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[J, T, T]: 0 where a token of the layer attends to another, else a large negative number."""
    places = torch.arange(sequence, device=device)
    back = places[:, None] - places
    reach = torch.tensor(windows, device=device)[:, None, None]
    seen = (back < reach) & (back >= 0 if causal else back > -reach)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, _masked(dtype))


def _above_diagonal(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)


def _merged(o: torch.Tensor, j: int, padding: Padding | None) -> torch.Tensor:
    """[J B, H, T, hd] -> [J, B T, D]."""
    batch, heads, sequence, width = o.shape
    o = o.transpose(1, 2).reshape(j, batch // j, sequence, heads * width)
    return (o if padding is None else padding.clear(o)).flatten(1, 2)


def _split_output(o: torch.Tensor, batch: int, heads: int, padding: Padding | None) -> torch.Tensor:
    """[J, B T, D] -> [J B, H, T, hd]."""
    j, m, d = o.shape
    if padding is not None:
        o = padding.clear(o.view(j, batch, m // batch, d))
    return o.reshape(j * batch, m // batch, heads, d // heads).transpose(1, 2)
