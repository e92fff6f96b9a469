"""One block in torch's own differentiable operations: what autograd, torch.compile and plain loops go through."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import ops
from .dropout import CROSS_PROJECTION, FFN, PROJECTION
from .heads import packed
from .settings import Weights
from .step_context import StepContext


def step(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One step x [B, T, D] -> [B, T, D] of the one layer that the context is for."""
    settings, h = context.settings, context.h

    def norm(t: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        if weight is None:  # there is no norm in this place
            return t
        if settings.normalization == "layer":
            return F.layer_norm(t, (settings.dim,), weight, bias, settings.eps)
        return ops.rms_norm(t[None], ops.inverse_rms(t[None], settings.eps), weight[None])[0]

    def drop(t: torch.Tensor, place: int) -> torch.Tensor:
        # A mask numbers the elements of [M, D].
        return context.dropped(t.flatten(0, 1)[None], place).view_as(t) if context.drops else t

    def attended(t: torch.Tensor) -> torch.Tensor:
        qkv = F.linear(t, w.qkv_weight, w.qkv_bias).flatten(0, 1)[None]
        if settings.modern:
            qkv = packed(context, w.map(lambda p: p[None]), qkv)[0]
        update = F.linear(context.attention(qkv).view(*x.shape[:2], -1), w.proj_weight, w.proj_bias)
        return drop(norm(update, w.ln1_out_weight, w.ln1_out_bias), PROJECTION)

    def remembered(t: torch.Tensor) -> torch.Tensor:
        q = F.linear(t, w.cross_q_weight, w.cross_q_bias).flatten(0, 1)[None]
        memory = norm(context.memory, w.ln_memory_weight, w.ln_memory_bias)
        o = context.cross_attention(q, F.linear(memory, w.cross_kv_weight, w.cross_kv_bias))
        return drop(F.linear(o.view_as(t), w.cross_proj_weight, w.cross_proj_bias), CROSS_PROJECTION)

    def ffn(t: torch.Tensor) -> torch.Tensor:
        pre = F.linear(t, w.up_weight, w.up_bias)
        a = (ops.gate if settings.gated else ops.activate)(pre, settings.activation)
        update = F.linear(a, w.down_weight, w.down_bias)
        return drop(norm(update, w.ln2_out_weight, w.ln2_out_bias), FFN)

    if settings.norm == "post":
        y = norm(x + attended(x), w.ln1_weight, w.ln1_bias)
        out = norm(y + ffn(y), w.ln2_weight, w.ln2_bias)
    else:
        y = x + attended(norm(x, w.ln1_weight, w.ln1_bias))
        if settings.cross:
            y = y + remembered(norm(y, w.ln_cross_weight, w.ln_cross_bias))
        out = y + ffn(norm(y, w.ln2_weight, w.ln2_bias))
    return out if h == 1 else torch.lerp(x, out, h)
