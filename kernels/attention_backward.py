"""Backward of :mod:`attention`: one kernel for the keys' and values' gradients, one for the queries'.

Each program owns a block of keys (or of queries) and walks over the other side, so that nothing is added up by more
than one program and the result is the same every time. The forward's `lse` gives the probabilities again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor, library

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
from .common import Launch, check, distinct, dot, round_to, strides_of, to_float


@triton.jit
def attention_bwd_delta_kernel(
    o,  # [J, B, H, T, HEAD]
    do,
    delta,  # [J, B, H, T], dense
    lengths,  # [J, B]
    o_strides,  # (J, B, H, T)
    do_strides,
    length_strides,
    B,
    H,
    T,
    HEAD: tl.constexpr,
    LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta = sum(o do) of each query: what the softmax's backward subtracts."""
    head, start = block_of(T, BLOCK, False)
    n = length_of(lengths, length_strides, head, B, H, T, LENGTHS)
    o_head, do_head = head_of(o, o_strides, head, B, H), head_of(do, do_strides, head, B, H)
    outputs = to_float(load_tile(o_head, o_strides[3], start, n, HEAD, BLOCK, BLOCK_D))  # [BLOCK, BD]
    grads = to_float(load_tile(do_head, do_strides[3], start, n, HEAD, BLOCK, BLOCK_D))
    tokens = start + tl.arange(0, BLOCK)
    tl.store(delta + head.to(tl.int64) * T + tokens, tl.sum(outputs * grads, 1), mask=tokens < T)


@triton.jit
def _product(rows, columns, acc: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """rows columns^T [R, C] of rows [R, BD] and columns [C, BD], in the type `acc`."""
    return dot(rows, tl.trans(columns), tl.zeros((rows.shape[0], columns.shape[0]), acc), INPUT_PRECISION)


@triton.jit
def attention_bwd_dkdv_kernel(
    q,  # [J, B, H, T, HEAD]
    k,
    v,
    do,
    lse,  # [J, B, H, T], dense
    delta,
    dk,
    dv,
    lengths,  # [J, B]
    seeds,  # [J]
    q_strides,  # (J, B, H, T)
    k_strides,
    v_strides,
    do_strides,
    out_strides,  # of dk and dv
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
    DROPOUT: tl.constexpr,
    BLOCK_OWN: tl.constexpr,  # keys
    BLOCK_OTHER: tl.constexpr,  # queries
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    head, start = block_of(T, BLOCK_OWN, False)
    n = length_of(lengths, length_strides, head, B, H, T, LENGTHS)
    q_head, do_head = head_of(q, q_strides, head, B, H), head_of(do, do_strides, head, B, H)
    k_head, v_head = head_of(k, k_strides, head, B, H), head_of(v, v_strides, head, B, H)
    keys = load_tile(k_head, k_strides[3], start, n, HEAD, BLOCK_OWN, BLOCK_D)  # [own, BD]
    values = load_tile(v_head, v_strides[3], start, n, HEAD, BLOCK_OWN, BLOCK_D)
    tokens = start + tl.arange(0, BLOCK_OWN)

    acc: tl.constexpr = lse.dtype.element_ty
    dks = tl.zeros((BLOCK_OWN, BLOCK_D), acc)
    dvs = tl.zeros((BLOCK_OWN, BLOCK_D), acc)
    statistics = head.to(tl.int64) * T
    if DROPOUT:
        seed, first_row = tl.load(seeds + head // (B * H)), head % (B * H) * T
    first = 0
    if CAUSAL:
        first = start // BLOCK_OTHER * BLOCK_OTHER
    # Queries that do not exist are zero rows and change nothing; keys that do not exist are left out at the end.
    for other in range(first, tl.where(start < n, n, 0), BLOCK_OTHER):
        others = other + tl.arange(0, BLOCK_OTHER)  # [other]
        queries = load_tile(q_head, q_strides[3], other, n, HEAD, BLOCK_OTHER, BLOCK_D)  # [other, BD]
        dos = load_tile(do_head, do_strides[3], other, n, HEAD, BLOCK_OTHER, BLOCK_D)  # [other, BD]
        sums = tl.load(lse + statistics + others, mask=others < n, other=0.0)
        deltas = tl.load(delta + statistics + others, mask=others < n, other=0.0)
        scores = _product(keys, queries, acc, INPUT_PRECISION) * (scale * LOG2_E) - (sums * LOG2_E)[None, :]
        if CAUSAL:
            scores = tl.where(others[None, :] >= tokens[:, None], scores, float("-inf"))
        p = tl.exp2(scores)  # [own, other]
        dp = _product(values, dos, acc, INPUT_PRECISION)
        if DROPOUT:
            dropping = (seed, place, levels, factor, T)
            kept = tl.trans(kept_factors(dropping, first_row + others, start, BLOCK_OTHER, BLOCK_OWN))
            dvs = dot(round_to(p * kept, dos.dtype), dos, dvs, INPUT_PRECISION)
            dp = dp * kept
        else:
            dvs = dot(round_to(p, dos.dtype), dos, dvs, INPUT_PRECISION)
        ds = p * (dp - deltas[None, :])
        dks = dot(round_to(ds, queries.dtype), queries, dks, INPUT_PRECISION)

    real = (tokens < n)[:, None]
    dk_head, dv_head = head_of(dk, out_strides, head, B, H), head_of(dv, out_strides, head, B, H)
    store_tile(dk_head, out_strides[3], start, T, tl.where(real, dks * scale, 0.0), HEAD)
    store_tile(dv_head, out_strides[3], start, T, tl.where(real, dvs, 0.0), HEAD)


@triton.jit
def attention_bwd_dq_kernel(
    q,  # [J, B, H, T, HEAD]
    k,
    v,
    do,
    lse,  # [J, B, H, T], dense
    delta,
    dq,
    lengths,  # [J, B]
    seeds,  # [J]
    q_strides,  # (J, B, H, T)
    k_strides,
    v_strides,
    do_strides,
    out_strides,
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
    DROPOUT: tl.constexpr,
    BLOCK_OWN: tl.constexpr,  # queries
    BLOCK_OTHER: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    head, start = block_of(T, BLOCK_OWN, True)
    n = length_of(lengths, length_strides, head, B, H, T, LENGTHS)
    q_head, do_head = head_of(q, q_strides, head, B, H), head_of(do, do_strides, head, B, H)
    k_head, v_head = head_of(k, k_strides, head, B, H), head_of(v, v_strides, head, B, H)
    queries = load_tile(q_head, q_strides[3], start, n, HEAD, BLOCK_OWN, BLOCK_D)  # [own, BD]
    dos = load_tile(do_head, do_strides[3], start, n, HEAD, BLOCK_OWN, BLOCK_D)
    tokens = start + tl.arange(0, BLOCK_OWN)
    statistics = head.to(tl.int64) * T + tokens
    sums = tl.load(lse + statistics, mask=tokens < n, other=0.0)
    deltas = tl.load(delta + statistics, mask=tokens < n, other=0.0)

    acc: tl.constexpr = lse.dtype.element_ty
    dqs = tl.zeros((BLOCK_OWN, BLOCK_D), acc)
    if DROPOUT:
        seed, rows = tl.load(seeds + head // (B * H)), head % (B * H) * T + tokens
    last = tl.where(start < n, n, 0)
    if CAUSAL:
        last = tl.minimum(last, start + BLOCK_OWN)
    for other in range(0, last, BLOCK_OTHER):
        keys = load_tile(k_head, k_strides[3], other, n, HEAD, BLOCK_OTHER, BLOCK_D)  # [other, BD]
        values = load_tile(v_head, v_strides[3], other, n, HEAD, BLOCK_OTHER, BLOCK_D)
        scores = _product(queries, keys, acc, INPUT_PRECISION) * (scale * LOG2_E) - (sums * LOG2_E)[:, None]
        others = other + tl.arange(0, BLOCK_OTHER)
        seen = (others < n)[None, :]  # 2^-lse of a key that does not exist may overflow
        if CAUSAL:
            seen = seen & (tokens[:, None] >= others[None, :])
        p = tl.exp2(tl.where(seen, scores, float("-inf")))  # [own, other]
        dp = _product(dos, values, acc, INPUT_PRECISION)
        if DROPOUT:
            dp = dp * kept_factors((seed, place, levels, factor, T), rows, other, BLOCK_OWN, BLOCK_OTHER)
        ds = p * (dp - deltas[:, None])
        dqs = dot(round_to(ds, keys.dtype), keys, dqs, INPUT_PRECISION)

    dqs = tl.where((tokens < n)[:, None], dqs * scale, 0.0)
    store_tile(head_of(dq, out_strides, head, B, H), out_strides[3], start, T, dqs, HEAD)


def attention_backward_reference(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    factors: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`attention_backward` does, in plain PyTorch; ``factors`` are dropout's."""
    wide = lse.dtype
    real, seen = real_and_seen(q, causal, lengths)
    do, q, k, v, o = (torch.where(real[..., None], x, 0) for x in (do, q, k, v, o))
    p = torch.where(seen, (scale * (q @ k.mT).to(wide) - lse[..., None]).exp(), 0)
    delta = (o.to(wide) * do.to(wide)).sum(-1, keepdim=True)
    ds = (p * ((do @ v.mT).to(wide) * factors - delta)).to(q.dtype)
    return (ds @ k).mul(scale), (ds.mT @ q).mul(scale), (p * factors).to(q.dtype).mT @ do


def default_config(head: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """The configuration for heads of `head` channels, padded to a power of 2, and sequences of `tokens`."""
    if dtype.itemsize > 2:
        return _config(*((32, 32, 4, 1) if head <= 64 else (16, 16, 4, 2)))
    if tokens <= 32:
        return _config(max(16, triton.next_power_of_2(tokens)), 32, 4, 2)
    return _config(*((64, 32, 4, 2) if head <= 64 else (64, 64, 8, 2)))


def dropout_config(head: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """:func:`default_config` with dropout."""
    if dtype.itemsize == 2 and head > 64 and tokens > 32:
        return _config(64, 32, 8, 2)
    return default_config(head, tokens, dtype)


def configs(head: int, tokens: int, dtype: torch.dtype) -> list[dict[str, int]]:
    """Candidates to tune over; arguments as for :func:`default_config`."""
    if dtype.itemsize > 2:
        sizes = [(16, 16, 4, 2)] + [(32, 16, 4, 1), (32, 32, 4, 1)] * (head <= 64)
    else:
        sizes = [(16, 32, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)]
        sizes += [(64, 64, 4, 2), (128, 64, 8, 2)] * (head <= 32) + [(64, 64, 8, 2)] * (head > 32)
    longest = max(16, triton.next_power_of_2(tokens))
    return distinct([default_config(head, tokens, dtype)] + [_config(*size) for size in sizes if size[0] <= longest])


def _config(own: int, other: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_OWN": own, "BLOCK_OTHER": other, "num_warps": warps, "num_stages": stages}


@library.custom_op("mlpint::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    seeds: Tensor | None = None,
    place: int = 0,
    levels: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of :func:`attention.attention_train`, given its arguments and results and the gradient of `o`.

    Returns:
        (dq, dk, dv), each [J, B, H, T, head dimension], views of dense [J, B, T, H, head dimension]; zero where
        there is no token.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    dq, dk, dv = (empty_heads(q) for _ in range(3))
    _backward(do, q, k, v, o, lse, causal, lengths, scale, Dropping(seeds, place, levels), dq, dk, dv)
    return dq, dk, dv


@library.custom_op("mlpint::attention_backward_packed", mutates_args=())
def attention_backward_packed(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    seeds: Tensor | None = None,
    place: int = 0,
    levels: int = 0,
) -> Tensor:
    """:func:`attention_backward` into one tensor [J, B, T, 3, H, head dimension], as a QKV projection has them."""
    out = _empty_packed(q)
    dropping = Dropping(seeds, place, levels)
    _backward(do, q, k, v, o, lse, causal, lengths, scale, dropping, *out.transpose(2, 4).unbind(3))
    return out


@attention_backward.register_fake
def _(do, q, k, v, o, lse, causal, lengths, scale, seeds=None, place=0, levels=0):
    return empty_heads(q), empty_heads(q), empty_heads(q)


@attention_backward_packed.register_fake
def _(do, q, k, v, o, lse, causal, lengths, scale, seeds=None, place=0, levels=0):
    return _empty_packed(q)


def _empty_packed(q: Tensor) -> Tensor:
    j, b, h, t, d = q.shape
    return q.new_empty(j, b, t, 3, h, d)


def _backward(do, q, k, v, o, lse, causal, lengths, scale, dropping, dq, dk, dv) -> None:
    check_heads(q, k, v, lengths)
    dropping.check(q)
    check("do", do, tuple(q.shape), like=q)
    check("o", o, tuple(q.shape), like=q)
    if lse.shape != q.shape[:4] or not lse.is_contiguous():
        raise ValueError(f"lse is {list(lse.shape)} with strides {lse.stride()}, expected attention_train's result")
    if q.numel():
        config = config_of("attention_backward", q, default_config, dropping, dropout_config)
        for launch in launches(do, q, k, v, o, lse, causal, lengths, scale, dq, dk, dv, config, dropping):
            launch.run()


def launches(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    config: dict[str, int],
    dropping: Dropping = NOTHING_DROPPED,
) -> Iterator[Launch]:
    """The three launches; dk and dv have the same strides."""
    j, b, h, t, _ = q.shape
    heads = j * b * h
    constexprs = constants(q, causal, lengths, dropping)
    delta = torch.empty_like(lse)
    shape = {name: constexprs[name] for name in ("HEAD", "BLOCK_D", "LENGTHS")}
    o_strides, do_strides, padding = *strides_of(o, do), length_strides(lengths)
    yield Launch(
        attention_bwd_delta_kernel,
        (triton.cdiv(t, 64) * heads,),
        (o, do, delta, lengths, o_strides, do_strides, padding, b, h, t),
        shape | {"BLOCK": 64, "num_warps": 4},
    )
    programs = (triton.cdiv(t, config["BLOCK_OWN"]) * heads,)
    strides = strides_of(q, k, v, do)
    numbers = *dropping.numbers, scale, b, h, t
    yield Launch(
        attention_bwd_dkdv_kernel,
        programs,
        (q, k, v, do, lse, delta, dk, dv, lengths, dropping.seeds, *strides, *strides_of(dk), padding, *numbers),
        constexprs | config,
    )
    yield Launch(
        attention_bwd_dq_kernel,
        programs,
        (q, k, v, do, lse, delta, dq, lengths, dropping.seeds, *strides, *strides_of(dq), padding, *numbers),
        constexprs | config,
    )


def aot_launches(candidates: bool = False) -> Iterator[Launch]:
    """The launches that `mlpint.kernels.aot` compiles."""
    for (q, k, v), lse, causal, lengths in aot_cases(candidates):
        head, tokens = padded_head(q), q.shape[3]
        for config in configs(head, tokens, q.dtype) if candidates else [default_config(head, tokens, q.dtype)]:
            yield from launches(q, q, k, v, q, lse, causal, lengths, 0.125, q, k, v, config)
        dropping = aot_dropping(q, causal)
        if dropping:
            config = dropout_config(head, tokens, q.dtype)
            yield from launches(q, q, k, v, q, lse, causal, lengths, 0.125, q, k, v, config, dropping)
