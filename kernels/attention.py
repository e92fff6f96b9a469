"""Self-attention with an online softmax, batched over layers, sequences and heads: forward, for padded batches too.

Where `lengths` are given, tokens at and beyond a sequence's length do not exist: they are never read, their outputs and
gradients are zero. The backward's kernels are in :mod:`attention_backward`.

Source: Dao et al., FlashAttention (arXiv:2205.14135, 2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from .attention_backward import attention_backward, attention_backward_packed
from .attention_backward import configs as backward_configs
from .attention_tiles import (
    LOG2_E,
    NOTHING_DROPPED,
    Dropping,
    aot_cases,
    aot_dropping,
    block_of,
    check_heads,
    config_of,
    constants,
    empty_heads,
    head_of,
    kept_factors,
    length_of,
    length_strides,
    load_tile,
    padded_head,
    real_and_seen,
    store_tile,
)
from .common import Launch, distinct, dot, round_to, strides_of

__all__ = [
    "attention",
    "attention_backward",
    "attention_backward_packed",
    "attention_reference",
    "attention_train",
    "backward_configs",
    "configs",
    "default_config",
]


@triton.jit
def _attend(
    acc,  # [BM, BD]
    top,  # [BM], largest score so far
    total,  # [BM], sum of 2^(score - top)
    q,  # [BM, BD]
    k,
    v,
    k_stride,
    v_stride,
    scale,  # with log2(e): scores are exponents of 2
    tokens,  # [BM], of the queries
    first,
    last,
    n,
    dropping,  # (seed, place, levels, factor, tokens in all), and for each query its row of all the layer's [BM]
    rows,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Attend to the keys from `first` to `last`; without MASK every query sees all of them."""
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    for start in range(first, last, BLOCK_N):
        keys = load_tile(k, k_stride, start, n, HEAD, BLOCK_N, BLOCK_D)  # [BN, BD]
        scores = scale * dot(q, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), acc.dtype), INPUT_PRECISION)
        if MASK:
            others = start + tl.arange(0, BLOCK_N)  # [BN]
            seen = (others < n)[None, :]
            if CAUSAL:
                seen = seen & (tokens[:, None] >= others[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        kept = p
        if DROPOUT:
            kept = p * kept_factors(dropping, rows, start, BLOCK_M, BLOCK_N)
        values = load_tile(v, v_stride, start, n, HEAD, BLOCK_N, BLOCK_D)  # [BN, BD]
        acc = dot(round_to(kept, values.dtype), values, acc * shrink[:, None], INPUT_PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = higher
    return acc, top, total


@triton.jit
def attention_fwd_kernel(
    q,  # [J, B, H, T, HEAD]
    k,
    v,
    o,
    lse,  # [J, B, H, T], dense
    lengths,  # [J, B]
    seeds,  # [J]
    q_strides,  # (J, B, H, T)
    k_strides,
    v_strides,
    o_strides,
    length_strides,
    place,
    levels,
    factor,
    scale,
    B,
    H,
    T,
    HEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    LENGTHS: tl.constexpr,
    LSE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    head, start = block_of(T, BLOCK_M, True)
    n = length_of(lengths, length_strides, head, B, H, T, LENGTHS)
    q_head = head_of(q, q_strides, head, B, H)
    queries = load_tile(q_head, q_strides[3], start, n, HEAD, BLOCK_M, BLOCK_D)  # [BM, BD]
    tokens = start + tl.arange(0, BLOCK_M)  # [BM]

    acc_type: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_D), acc_type)
    top = tl.full((BLOCK_M,), float("-inf"), acc_type)
    total = tl.zeros((BLOCK_M,), acc_type)
    k_head, v_head = head_of(k, k_strides, head, B, H), head_of(v, v_strides, head, B, H)
    last = tl.where(start < n, n, 0)
    full = last // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = tl.minimum(last, start + BLOCK_M)
        full = tl.minimum(last, start + 1) // BLOCK_N * BLOCK_N
    scale = scale * LOG2_E
    dropping = (0, place, levels, factor, T)
    rows = tokens
    if DROPOUT:
        dropping = (tl.load(seeds + head // (B * H)), place, levels, factor, T)
        rows = head % (B * H) * T + tokens
    acc, top, total = _attend(
        acc, top, total, queries, k_head, v_head, k_strides[3], v_strides[3], scale, tokens, 0, full, n,
        dropping, rows, False, CAUSAL, DROPOUT, HEAD, BLOCK_N, INPUT_PRECISION,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, k_head, v_head, k_strides[3], v_strides[3], scale, tokens, full, last, n,
        dropping, rows, True, CAUSAL, DROPOUT, HEAD, BLOCK_N, INPUT_PRECISION,
    )  # fmt: skip

    real = tokens < n
    acc = tl.where(real[:, None], acc / tl.where(real, total, 1.0)[:, None], 0.0)
    store_tile(head_of(o, o_strides, head, B, H), o_strides[3], start, T, acc, HEAD)
    if LSE:
        value = tl.where(real, (top + tl.log2(tl.where(real, total, 1.0))) / LOG2_E, 0.0)
        tl.store(lse + head.to(tl.int64) * T + tokens, value, mask=tokens < T)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    factors: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(o, lse) of :func:`attention_train`, in plain PyTorch; differentiable. ``factors`` are dropout's."""
    wide = torch.promote_types(q.dtype, torch.float32)
    real, seen = real_and_seen(q, causal, lengths)
    q, k, v = (torch.where(real[..., None], x, 0) for x in (q, k, v))
    scores = scale * (q @ k.mT).to(wide)
    lse = torch.where(seen, scores, -torch.inf).masked_fill(~real[..., None], 0).logsumexp(-1)
    p = torch.where(seen, (scores - lse[..., None]).exp(), 0)
    return (p * factors).to(v.dtype) @ v, torch.where(real, lse, 0)


def default_config(head: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """The configuration for heads of `head` channels, padded to a power of 2, and sequences of `tokens`."""
    if dtype.itemsize > 2:
        return _config(*((32, 32, 4, 2) if head <= 64 else (32, 16, 8, 2)))
    block = min(64, max(16, triton.next_power_of_2(tokens)))
    return _config(block, 32 if head <= 32 else 64, 4, 2)


def dropout_config(head: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """:func:`default_config` with dropout."""
    config = default_config(head, tokens, dtype)
    return config | {"num_warps": 8} if dtype.itemsize == 2 and config["BLOCK_M"] == 64 else config


def configs(head: int, tokens: int, dtype: torch.dtype) -> list[dict[str, int]]:
    """Candidates to tune over; arguments as for :func:`default_config`."""
    if dtype.itemsize > 2:
        sizes = [(16, 16, 4, 2), (32, 16, 4 if head <= 64 else 8, 2)] + [(32, 32, 4, 2)] * (head <= 64)
    else:
        sizes = [(16, 32, 4, 2), (32, 32, 4, 2), (64, 32, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)]
    longest = max(16, triton.next_power_of_2(tokens))
    return distinct([default_config(head, tokens, dtype)] + [_config(*size) for size in sizes if size[0] <= longest])


def _config(block_m: int, block_n: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


@library.custom_op("mlpint::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    seeds: Tensor | None = None,
    place: int = 0,
    levels: int = 0,
) -> Tensor:
    """softmax(scale q k^T) v of each head, forward only.

    Args:
        q, k, v: [J, B, H, T, head dimension <= 128], alike; any strides but the last, e.g. of [J, B, T, 3, H, hd].
        causal: a token sees itself and what is before it.
        lengths: tokens of each sequence, int32 [J, B] or [B] on the device; outside 0..T they count as 0 or T.
        scale: of the scores, usually 1 / sqrt(head dimension).
        seeds, place, levels: of the weights' dropout, as :func:`mlpint.kernels.dropout.dropout_mask` takes them, for
            [B H T, T] of each layer. Without seeds nothing is dropped.

    Returns:
        [J, B, H, T, head dimension], a view of dense [J, B, T, H, head dimension]; zero where there is no token.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    return _forward(q, k, v, None, causal, lengths, scale, Dropping(seeds, place, levels))


@library.custom_op("mlpint::attention_train", mutates_args=())
def attention_train(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    seeds: Tensor | None = None,
    place: int = 0,
    levels: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`attention`, and what its backward needs: (o, lse).

    `lse` [J, B, H, T], float32 (float64 where q is): logarithm of the sum of exponentials of a query's scores, zero
    where there is no token.
    """
    lse = _empty_lse(q)
    return _forward(q, k, v, lse, causal, lengths, scale, Dropping(seeds, place, levels)), lse


@attention.register_fake
def _(q, k, v, causal, lengths, scale, seeds=None, place=0, levels=0):
    return empty_heads(q)


@attention_train.register_fake
def _(q, k, v, causal, lengths, scale, seeds=None, place=0, levels=0):
    return empty_heads(q), _empty_lse(q)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:4], dtype=torch.promote_types(q.dtype, torch.float32))


def _forward(q, k, v, lse, causal, lengths, scale, dropping) -> Tensor:
    """The output; the log-sum-exp is written to ``lse``, where it is not None."""
    check_heads(q, k, v, lengths)
    dropping.check(q)
    o = empty_heads(q)
    if q.numel():
        config = config_of("attention", q, default_config, dropping, dropout_config)
        launch_of(q, k, v, o, lse, causal, lengths, scale, config, dropping).run()
    return o


def launch_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    config: dict[str, int],
    dropping: Dropping = NOTHING_DROPPED,
) -> Launch:
    j, b, h, t, _ = q.shape
    return Launch(
        attention_fwd_kernel,
        (triton.cdiv(t, config["BLOCK_M"]) * j * b * h,),
        (
            *(q, k, v, o, lse, lengths, dropping.seeds),
            *(*strides_of(q, k, v, o), length_strides(lengths), *dropping.numbers, scale, b, h, t),
        ),
        constants(q, causal, lengths, dropping) | {"LSE": lse is not None} | config,
    )


def aot_launches(candidates: bool = False) -> Iterator[Launch]:
    """The launches that `mlpint.kernels.aot` compiles."""
    for (q, k, v), lse, causal, lengths in aot_cases(candidates):
        head, tokens = padded_head(q), q.shape[3]
        for config in configs(head, tokens, q.dtype) if candidates else [default_config(head, tokens, q.dtype)]:
            yield launch_of(q, k, v, q, lse if causal else None, causal, lengths, 0.125, config)
        dropping = aot_dropping(q, causal)
        if dropping:
            yield launch_of(q, k, v, q, lse, causal, lengths, 0.125, dropout_config(head, tokens, q.dtype), dropping)
