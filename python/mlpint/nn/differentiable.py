"""One block in torch's own differentiable operations: what autograd, torch.compile and plain loops go through."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import attention as attn
from . import dropout
from .dropout import FFN, PROJECTION
from .heads import inverse_rms, packed
from .modern import activated
from .settings import BlockSettings, Weights


def step(
    settings: BlockSettings,
    w: Weights[torch.Tensor],
    x: torch.Tensor,
    lengths: torch.Tensor | None,
    key: int | None,
    h: float,
) -> torch.Tensor:
    """One step x [B, T, D] -> [B, T, D]; h is the whole step size, ``key`` that of dropout."""
    if settings.modern:
        return _modern_step(settings, w, x, lengths, key, h)
    padding = None if lengths is None else attn.Padding(lengths, x.shape[1])
    shape = (settings.dim,)
    post = settings.norm == "post"

    def drop(t: torch.Tensor, place: int) -> torch.Tensor:
        # A mask numbers the elements of [M, D].
        return t if key is None else dropout.dropped(t.flatten(0, 1)[None], [key], place, settings.dropout).view_as(t)

    def ffn(t: torch.Tensor) -> torch.Tensor:
        a = F.gelu(F.linear(t, w.up_weight, w.up_bias), approximate=settings.gelu)
        return drop(F.linear(a, w.down_weight, w.down_bias), FFN)

    n = x if post else F.layer_norm(x, shape, w.ln1_weight, w.ln1_bias, settings.eps)
    o = _attend(settings, F.linear(n, w.qkv_weight, w.qkv_bias), padding, key)
    y = x + drop(F.linear(o, w.proj_weight, w.proj_bias), PROJECTION)
    if post:
        y = F.layer_norm(y, shape, w.ln1_weight, w.ln1_bias, settings.eps)
        out = F.layer_norm(y + ffn(y), shape, w.ln2_weight, w.ln2_bias, settings.eps)
    else:
        out = y + ffn(F.layer_norm(y, shape, w.ln2_weight, w.ln2_bias, settings.eps))
    return out if h == 1 else torch.lerp(x, out, h)


def _modern_step(
    settings: BlockSettings,
    w: Weights[torch.Tensor],
    x: torch.Tensor,
    lengths: torch.Tensor | None,
    key: int | None,
    h: float,
) -> torch.Tensor:
    """That of modern.py."""
    padding = None if lengths is None else attn.Padding(lengths, x.shape[1])

    def norm(t: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if settings.normalization == "layer":
            return F.layer_norm(t, (settings.dim,), weight, bias, settings.eps)
        return (t * inverse_rms(t, settings.eps).unsqueeze(-1)).to(t.dtype) * weight

    def drop(t: torch.Tensor, place: int) -> torch.Tensor:
        return t if key is None else dropout.dropped(t.flatten(0, 1)[None], [key], place, settings.dropout).view_as(t)

    qkv = F.linear(norm(x, w.ln1_weight, w.ln1_bias), w.qkv_weight, w.qkv_bias)
    into = packed(settings, w.map(lambda t: t.unsqueeze(0)), qkv.flatten(0, 1).unsqueeze(0), len(x))[0]
    o = _attend(settings, into.view(*x.shape[:2], -1), padding, key)
    y = x + drop(F.linear(o, w.proj_weight, w.proj_bias), PROJECTION)
    pre = F.linear(norm(y, w.ln2_weight, w.ln2_bias), w.up_weight, w.up_bias)
    out = y + drop(F.linear(activated(settings, pre), w.down_weight, w.down_bias), FFN)
    return out if h == 1 else torch.lerp(x, out, h)


def _attend(settings: BlockSettings, qkv: torch.Tensor, padding: attn.Padding | None, key: int | None) -> torch.Tensor:
    batch, sequence, _ = qkv.shape
    flat = qkv.view(1, batch * sequence, -1)
    if key is not None and settings.attention_dropout:
        o, _ = attn.dropout_attention(
            flat, batch, settings.heads, settings.causal, padding, settings.scale, [key], settings.attention_dropout
        )
    else:
        o = attn.attention(flat, batch, settings.heads, settings.causal, padding, settings.scale)
    return o.view(batch, sequence, -1)
