"""Queries, keys and values on their way into attention: a norm of each head, rotary positions, grouped queries.

Of qkv [J, B T, (H + 2 K) hd], H query heads and K heads of keys and values, :func:`packed` makes [J, B T, 3 H hd],
which attention takes: key head k stands H / K times, for the query heads k H / K, k H / K + 1, ...
"""

from __future__ import annotations

import functools
import math
from types import ModuleType

import torch

from . import ops
from .kernels import kernel, recorded
from .settings import BlockSettings, Weights
from .step_context import StepContext

Tensors = tuple[torch.Tensor, ...]


def packed(
    context: StepContext, w: Weights[torch.Tensor], qkv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What attention takes, and 1 / root mean square of queries and keys, [J, B, T, heads] each (empty without norm;
    [J, B, T] where all heads have one together).

    Differentiable.
    """
    settings = context.settings
    weights = w.q_norm_weight, w.k_norm_weight
    given = [qkv, *(t for t in weights if t is not None)]
    followed = recorded(*given)
    module = None if followed else _kernel(context, *given)
    if module:
        tables = _flat_rotation(context, qkv)
        out, *rms = module.pack_heads(qkv, settings.heads, settings.kv_heads, *weights, *tables, settings.eps)
        shape = len(qkv), context.batch, qkv.shape[1] // context.batch
        return out, *(t.view(*shape, -1) if t.numel() else t for t in rms)
    q, k, v = _split(settings, qkv, context.batch)
    q_rms = k_rms = qkv.new_empty(len(qkv), 0)
    if w.q_norm_weight is not None and w.k_norm_weight is not None:
        q, k = (_normed(settings, t) for t in (q, k))
        q_rms, k_rms = ops.inverse_rms(q, settings.eps), ops.inverse_rms(k, settings.eps)
        q, k = ops.rms_norm(q, q_rms, w.q_norm_weight), ops.rms_norm(k, k_rms, w.k_norm_weight)
        q, k = (t.view(*t.shape[:3], -1, settings.head_width) for t in (q, k))
    if followed:
        return _together(context, q, k, v), q_rms, k_rms
    return _in_place(context, q, k, v), q_rms, k_rms


def _together(context: StepContext, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of heads [J, B, T, H or K, hd] what attention takes, by what autograd can follow."""
    settings = context.settings
    if settings.positions == "rotary":
        cos, sin = _rotation(context, q)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    k, v = (t.repeat_interleave(settings.heads // settings.kv_heads, 3) for t in (k, v))
    return torch.cat([t.flatten(3) for t in (q, k, v)], -1).flatten(1, 2)


def _in_place(context: StepContext, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same, each head written once, to where it belongs."""
    settings = context.settings
    j, batch, sequence, heads, width = q.shape
    out = q.new_empty(j, batch, sequence, 3, heads, width)
    grouped = out.unflatten(4, (settings.kv_heads, heads // settings.kv_heads))
    grouped[:, :, :, 2].copy_(v.unsqueeze(4))
    if settings.positions == "rotary":
        cos, sin = _rotation(context, q)
        _rotate_into(out[:, :, :, 0], q, cos, sin)
        k = _rotated(k, cos, sin)
    else:
        out[:, :, :, 0].copy_(q)
    grouped[:, :, :, 1].copy_(k.unsqueeze(4))
    return out.view(j, batch * sequence, 3 * heads * width)


def packed_backward(
    context: StepContext,
    w: Weights[torch.Tensor],
    grad: torch.Tensor,
    qkv: torch.Tensor,
    q_rms: torch.Tensor,
    k_rms: torch.Tensor,
) -> tuple[torch.Tensor, Tensors]:
    """The gradient for qkv, and those of the norms' weights, [J, hd] each (empty without norm).

    Args:
        grad: for what :func:`packed` gave.
        qkv: as it was given; read only where there is a norm.
    """
    settings, batch = context.settings, context.batch
    j, m, _ = grad.shape
    d_qkv = _unpacked(context, grad)
    norms: Tensors = (grad.new_empty(j, 0), grad.new_empty(j, 0))
    if w.q_norm_weight is not None and w.k_norm_weight is not None:
        d_q, d_k, _ = _split(settings, d_qkv, batch)
        before_q, before_k = (_normed(settings, t) for t in _split(settings, qkv, batch)[:2])
        q, k = d_q.reshape(before_q.shape), d_k.reshape(before_k.shape)
        norms = ops.rms_norm_weight_grad(q, before_q, q_rms), ops.rms_norm_weight_grad(k, before_k, k_rms)
        d_q.copy_(ops.rms_norm_backward(q, before_q, q_rms, w.q_norm_weight).view(d_q.shape))
        d_k.copy_(ops.rms_norm_backward(k, before_k, k_rms, w.k_norm_weight).view(d_k.shape))
    return d_qkv, norms


def _unpacked(context: StepContext, grad: torch.Tensor) -> torch.Tensor:
    """The gradient for qkv, or for what the norms gave where there are some."""
    settings = context.settings
    heads, kv_heads, width = settings.heads, settings.kv_heads, settings.head_width
    module = _kernel(context, grad)
    if module:
        return module.pack_heads_backward(grad, heads, kv_heads, *_flat_rotation(context, grad))
    j, m, _ = grad.shape
    q, k, v = grad.view(j, context.batch, m // context.batch, 3, heads, width).unbind(3)
    d_qkv = grad.new_empty(*q.shape[:3], heads + 2 * kv_heads, width)
    d_q, d_k, d_v = d_qkv.split([heads, kv_heads, kv_heads], 3)
    if heads == kv_heads:
        d_v.copy_(v)
    else:
        k = k.unflatten(3, (kv_heads, heads // kv_heads)).sum(4)
        torch.sum(v.unflatten(3, (kv_heads, heads // kv_heads)), 4, out=d_v)
    if settings.positions == "rotary":
        cos, sin = _rotation(context, q)
        _rotate_into(d_q, q, cos, -sin)
        _rotate_into(d_k, k, cos, -sin)
    else:
        d_q.copy_(q)
        d_k.copy_(k)
    return d_qkv.view(j, m, -1)


def _kernel(context: StepContext, x: torch.Tensor, *others: torch.Tensor) -> ModuleType | None:
    """The module of the kernels that do all of this in one pass, where they are taken for x [J, M, ...]."""
    settings = context.settings
    if settings.qk_norm == "all" or settings.head_width % 2:
        return None
    return kernel("pack_heads", settings.head_width, x.shape[1], len(x), x, *others)


def _flat_rotation(context: StepContext, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Cosine and sine [R, hd / 2] as the kernels take them: row m of a batch is turned by row m % R."""
    if context.settings.positions != "rotary":
        return None, None
    tables = context.rotation
    if tables is None:
        sequence = x.shape[1] // context.batch
        tables = rotary_tables(context.settings, sequence, x.device, x.dtype)
    cos, sin = (table.to(x.dtype).reshape(-1, table.shape[-1]).contiguous() for table in tables)
    return cos, sin


def _normed(settings: BlockSettings, heads: torch.Tensor) -> torch.Tensor:
    """Of [J, B, T, heads, hd] what the norm is taken over as the last dimension."""
    return heads.flatten(3) if settings.qk_norm == "all" else heads


def _rotation(context: StepContext, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and signed sine for heads [J, B, T, heads, hd], as :func:`_rotated` takes them."""
    if context.rotation is not None:
        cos, sin = (table.unsqueeze(2).to(heads.dtype) for table in context.rotation)
        return _over_both_halves(cos, sin)
    return _signed_tables(context.settings, heads.shape[2], heads.device, heads.dtype)


def _over_both_halves(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


@functools.lru_cache(maxsize=64)
def _signed_tables(
    settings: BlockSettings, sequence: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return _over_both_halves(*rotary_tables(settings, sequence, device, dtype))


@functools.lru_cache(maxsize=64)
def rotary_tables(
    settings: BlockSettings, sequence: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine by position and pair of channels (c, c + hd / 2), [T, 1, hd / 2]."""
    half = settings.head_width // 2
    frequencies = settings.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    if settings.rope_scaling is not None:
        factor, low, high, original = settings.rope_scaling
        # Llama 3: slow rotations are slowed down by the factor, fast ones left, those between in proportion.
        turns = original * frequencies / (2 * math.pi)
        part = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - part) * frequencies / factor + part * frequencies
    length = 1.0
    if settings.yarn is not None:
        factor, fast, slow, original, length = settings.yarn
        # YaRN (Peng et al., 2023): those that turn less often than `slow` are slowed down, more often than `fast` left.
        places = [
            half * math.log(original / (turns * 2 * math.pi)) / math.log(settings.rope_theta) for turns in (fast, slow)
        ]
        low, high = max(math.floor(places[0]), 0), min(math.ceil(places[1]), settings.head_width - 1)
        slowed = ((torch.arange(half, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequencies = slowed * frequencies / factor + (1 - slowed) * frequencies
    angles = torch.outer(torch.arange(sequence, dtype=torch.float64), frequencies)[:, None]
    return (length * angles.cos()).to(device, dtype), (length * angles.sin()).to(device, dtype)


def _split(settings: BlockSettings, qkv: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """[J, B T, (H + 2 K) hd] -> q [J, B, T, H, hd], k and v [J, B, T, K, hd]."""
    j, m, _ = qkv.shape
    heads = qkv.view(j, batch, m // batch, -1, settings.head_width)
    return heads.split([settings.heads, settings.kv_heads, settings.kv_heads], 3)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(a cos - b sin, b cos + a sin) of channels (a, b), of tables (cos, cos) and (-sin, sin). Differentiable."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _rotate_into(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """The same, written to where it belongs."""
    torch.mul(x, cos, out=out).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
