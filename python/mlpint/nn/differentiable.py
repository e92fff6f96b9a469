"""One block in torch's own differentiable operations: what autograd, torch.compile and plain loops go through."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import attention as attn
from . import dropout, ops
from .dropout import FFN, PROJECTION
from .heads import packed
from .modern import activated
from .settings import BlockSettings, Weights


def step(
    settings: BlockSettings,
    w: Weights[torch.Tensor],
    x: torch.Tensor,
    lengths: torch.Tensor | None,
    key: int | None,
    h: float,
    layer: int = 0,
) -> torch.Tensor:
    """One step x [B, T, D] -> [B, T, D] of layer n; h is the whole step size, ``key`` that of dropout."""
    windows = settings.windows([layer], x.shape[1])
    padding = None if lengths is None else attn.Padding(lengths, x.shape[1])

    def norm(t: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        if weight is None:  # there is no norm in this place
            return t
        if settings.normalization == "layer":
            return F.layer_norm(t, (settings.dim,), weight, bias, settings.eps)
        return ops.rms_norm(t[None], ops.inverse_rms(t[None], settings.eps), weight[None])[0]

    def drop(t: torch.Tensor, place: int) -> torch.Tensor:
        # A mask numbers the elements of [M, D].
        return t if key is None else dropout.dropped(t.flatten(0, 1)[None], [key], place, settings.dropout).view_as(t)

    def attended(t: torch.Tensor) -> torch.Tensor:
        qkv = F.linear(t, w.qkv_weight, w.qkv_bias)
        if settings.modern:
            flat = packed(settings, w.map(lambda p: p[None]), qkv.flatten(0, 1)[None], len(x))[0]
            qkv = flat.view(*x.shape[:2], -1)
        o = _attend(settings, qkv, padding, key, windows)
        update = F.linear(o, w.proj_weight, w.proj_bias)
        return drop(norm(update, w.ln1_out_weight, w.ln1_out_bias), PROJECTION)

    def ffn(t: torch.Tensor) -> torch.Tensor:
        a = activated(settings, F.linear(t, w.up_weight, w.up_bias))
        update = F.linear(a, w.down_weight, w.down_bias)
        return drop(norm(update, w.ln2_out_weight, w.ln2_out_bias), FFN)

    if settings.norm == "post":
        y = norm(x + attended(x), w.ln1_weight, w.ln1_bias)
        out = norm(y + ffn(y), w.ln2_weight, w.ln2_bias)
    else:
        y = x + attended(norm(x, w.ln1_weight, w.ln1_bias))
        out = y + ffn(norm(y, w.ln2_weight, w.ln2_bias))
    return out if h == 1 else torch.lerp(x, out, h)


def _attend(
    settings: BlockSettings,
    qkv: torch.Tensor,
    padding: attn.Padding | None,
    key: int | None,
    windows: tuple[int, ...] | None,
) -> torch.Tensor:
    batch, sequence, _ = qkv.shape
    flat = qkv.view(1, batch * sequence, -1)
    shape = (batch, settings.heads, settings.causal, padding, settings.scale, windows)
    if key is not None and settings.attention_dropout:
        o, _ = attn.dropout_attention(flat, [key], settings.attention_dropout, *shape)
    else:
        o = attn.attention(flat, *shape)
    return o.view(batch, sequence, -1)
