"""torch's own fused attentions with their log-sum-exp, so that a backward need not evaluate attention again.

All take q, k, v [N, H, T, hd], what is added to the scores (or None) and whether causality comes on top. A forward
gives the output [N, H, T, hd] and the log-sum-exp [N, H, T or more], a backward the gradients for q, k, v.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.backends import cuda
from torch.nn import functional as F

Tensors = tuple[torch.Tensor, ...]
aten = torch.ops.aten


class FusedAttention(Protocol):
    """One of torch's implementations."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor,
        bias: torch.Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensors: ...


def chosen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, causal: bool
) -> FusedAttention | None:
    """The one for these operands; None where torch has none (double precision on a GPU, say)."""
    if q.device.type == "cpu":
        return _Cpu()
    if q.device.type != "cuda":
        return None
    # Both ask for rows of whole 16 bytes; torch itself would pad others, and they are left to it.
    if q.shape[-1] * q.element_size() % 16:
        return None
    operands = cuda.SDPAParams(q, k, v, bias, 0.0, causal, False)
    if bias is None and cuda.can_use_flash_attention(operands):
        return _Flash()
    return _Efficient() if cuda.can_use_efficient_attention(operands) else None


def backward_again(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> Tensors:
    """What a backward gives where there is no log-sum-exp: attention is evaluated again, under autograd."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    with torch.enable_grad():
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return torch.autograd.grad(o, (q, k, v), grad)


class _Cpu:
    def forward(self, q, k, v, bias, causal, scale):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)

    def backward(self, grad, q, k, v, o, lse, bias, causal, scale):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, lse, 0.0, causal, attn_mask=bias, scale=scale
        )


class _Flash:
    def forward(self, q, k, v, bias, causal, scale):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]

    def backward(self, grad, q, k, v, o, lse, bias, causal, scale):
        no_seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, which there is none of
        lse = lse.narrow(-1, 0, q.shape[2]).contiguous()
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, no_seed, no_seed, scale=scale
        )


class _Efficient:
    def forward(self, q, k, v, bias, causal, scale):
        return aten._scaled_dot_product_efficient_attention(q, k, v, _aligned(bias, q), True, 0.0, causal, scale=scale)[
            :2
        ]

    def backward(self, grad, q, k, v, o, lse, bias, causal, scale):
        no_seed = torch.empty((), dtype=torch.int64, device=q.device)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32))  # whole blocks of queries, as its own forward gives it
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, _aligned(bias, q), o, lse, no_seed, no_seed, 0.0, [True, True, True, False], causal,
            scale=scale,
        )[:3]  # fmt: skip


def _aligned(bias: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """A bias of the whole shape, whose rows begin at multiples of 16 elements, as the operation wants it."""
    if bias is None:
        return None
    n, heads, length, _ = q.shape
    keys = bias.shape[-1]
    padded = F.pad(bias, (0, -keys % 16)) if keys % 16 else bias
    return padded.narrow(-1, 0, keys).expand(n, heads, length, keys)
