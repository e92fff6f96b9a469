"""Queries, keys and values on their way into attention in one pass: norms of heads, rotary positions, grouped queries.

Of qkv [J, M, (H + 2 K) hd], H query heads and K of keys and values, comes [J, M, 3 H hd], key head k standing H / K
times. A program takes a block of rows of one head, and writes it wherever it stands. The backward adds the copies up
and turns back; that of the norms is left to its caller.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from . import dispatch
from .common import Launch, check, round_to, to_float


@triton.jit
def place_of(head, H, K):
    """Of source head s in [0, H + 2 K): the first of its places among 3 H, and how many there are."""
    group = H // K
    key = head - H  # among keys and values
    first = tl.where(head < H, head, H + key // K * H + key % K * group)
    return first, tl.where(head < H, 1, group)


@triton.jit
def turns(cos, sin, rows, columns, mask, head, H, K, R, HALF):
    """Cosine and sine [BM, BC] for rows of a head; values are not turned."""
    at = (rows % R)[:, None] * HALF + columns[None, :]
    value = head >= H + K
    c = tl.where(value, 1.0, to_float(tl.load(cos + at, mask=mask, other=0.0)))
    s = tl.where(value, 0.0, to_float(tl.load(sin + at, mask=mask, other=0.0)))
    return c, s


@triton.jit
def pack_heads_fwd_kernel(
    qkv,  # [J, M, H + 2 K, 2 HALF], dense
    q_weight,  # [J, 2 HALF], or None: no norms
    k_weight,  # [J, 2 HALF], or None
    cos,  # [R, HALF], dense, or None: no positions; row m is turned by the table's m % R
    sin,
    out,  # [J, M, 3 H, 2 HALF], dense
    q_rms,  # [J, M, H], float32, dense, or None
    k_rms,  # [J, M, K], float32, dense, or None
    weight_strides,  # (J,) of q_weight
    key_strides,  # (J,) of k_weight
    M,
    H,
    K,
    R,
    HALF,
    eps,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= HALF
):
    tiles = tl.cdiv(M, BLOCK_M)
    layer = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK_C)
    mask = (rows < M)[:, None] & (columns < HALF)[None, :]
    rows64 = layer * M + rows.to(tl.int64)
    at = (rows64 * (H + 2 * K) + head)[:, None] * (2 * HALF) + columns[None, :]
    a = to_float(tl.load(qkv + at, mask=mask, other=0.0))  # [BM, BC]
    b = to_float(tl.load(qkv + at + HALF, mask=mask, other=0.0))
    if NORM:
        query, key = head < H, (head >= H) & (head < H + K)
        rms = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
        tl.store(q_rms + rows64 * H + head, rms, mask=(rows < M) & query)
        tl.store(k_rms + rows64 * K + head - H, rms, mask=(rows < M) & key)
        own = (columns < HALF) & query
        other = (columns < HALF) & key
        q_at, k_at = q_weight + layer * weight_strides[0] + columns, k_weight + layer * key_strides[0] + columns
        wa = to_float(tl.load(q_at, mask=own, other=0.0)) + to_float(tl.load(k_at, mask=other, other=0.0))
        wb = to_float(tl.load(q_at + HALF, mask=own, other=0.0)) + to_float(tl.load(k_at + HALF, mask=other, other=0.0))
        is_value = head >= H + K
        a *= tl.where(is_value, 1.0, rms[:, None] * wa[None, :])
        b *= tl.where(is_value, 1.0, rms[:, None] * wb[None, :])
    if ROTARY:
        c, s = turns(cos, sin, rows, columns, mask, head, H, K, R, HALF)
        turned = a * c - b * s
        b = b * c + a * s
        a = turned
    first, count = place_of(head, H, K)
    to = (rows64 * (3 * H) + first)[:, None] * (2 * HALF) + columns[None, :]
    for copy in range(0, count):
        tl.store(out + to + copy * 2 * HALF, round_to(a, out.dtype.element_ty), mask=mask)
        tl.store(out + to + copy * 2 * HALF + HALF, round_to(b, out.dtype.element_ty), mask=mask)


@triton.jit
def pack_heads_bwd_kernel(
    grad,  # [J, M, 3 H, 2 HALF], dense
    cos,  # [R, HALF], dense, or None
    sin,
    d_qkv,  # [J, M, H + 2 K, 2 HALF], dense
    M,
    H,
    K,
    R,
    HALF,
    ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= HALF
):
    tiles = tl.cdiv(M, BLOCK_M)
    layer = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK_C)
    mask = (rows < M)[:, None] & (columns < HALF)[None, :]
    rows64 = layer * M + rows.to(tl.int64)
    first, count = place_of(head, H, K)
    at = (rows64 * (3 * H) + first)[:, None] * (2 * HALF) + columns[None, :]
    a = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for copy in range(0, count):
        a += to_float(tl.load(grad + at + copy * 2 * HALF, mask=mask, other=0.0))
        b += to_float(tl.load(grad + at + copy * 2 * HALF + HALF, mask=mask, other=0.0))
    if ROTARY:
        c, s = turns(cos, sin, rows, columns, mask, head, H, K, R, HALF)
        turned = a * c + b * s
        b = b * c - a * s
        a = turned
    to = (rows64 * (H + 2 * K) + head)[:, None] * (2 * HALF) + columns[None, :]
    tl.store(d_qkv + to, round_to(a, d_qkv.dtype.element_ty), mask=mask)
    tl.store(d_qkv + to + HALF, round_to(b, d_qkv.dtype.element_ty), mask=mask)


def pack_heads_reference(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`pack_heads` does, in plain PyTorch."""
    layers, m, width = qkv.shape
    split = qkv.view(layers, m, heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], 2)
    q, k, v = split
    none = qkv.new_empty(layers, 0, dtype=torch.promote_types(qkv.dtype, torch.float32))
    rms = [none, none]
    if q_weight is not None and k_weight is not None:
        rms = [t.to(none.dtype).square().mean(-1).add(eps).rsqrt() for t in (q, k)]
        q, k = (
            (t * r[..., None]).to(t.dtype) * w[:, None, None]
            for t, r, w in zip((q, k), rms, (q_weight, k_weight), strict=True)
        )
    if cos is not None and sin is not None:
        repeat = m // len(cos)
        c, s = (table.repeat(repeat, 1)[:, None] for table in (cos, sin))
        q, k = (torch.cat([a * c - b * s, b * c + a * s], -1) for a, b in (t.chunk(2, -1) for t in (q, k)))
    k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (k, v))
    return torch.cat([q, k, v], 2).flatten(2), rms[0], rms[1]


def pack_heads_backward_reference(
    grad: Tensor, heads: int, kv_heads: int, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """What :func:`pack_heads_backward` does, by autograd."""
    layers, m, width = grad.shape
    with torch.enable_grad():
        leaf = grad.new_zeros(layers, m, (heads + 2 * kv_heads) * (width // 3 // heads)).requires_grad_()
        out = pack_heads_reference(leaf, heads, kv_heads, None, None, cos, sin)[0]
    return torch.autograd.grad(out, leaf, grad)[0]


def default_config(width: int = 64) -> dict[str, int]:
    """The configuration of a launch for which no tuned one is known; of heads so wide."""
    return _config(max(4, min(64, 4096 // triton.next_power_of_2(width))), 4)


def configs(width: int = 64) -> list[dict[str, int]]:
    """Candidates to tune over."""
    return [_config(*c) for c in ((8, 2), (16, 2), (32, 4), (64, 4), (64, 8))]


def _config(m, warps):
    return {"BLOCK_M": m, "num_warps": warps}


def forward_launch(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    weights: tuple[Tensor | None, Tensor | None],
    tables: tuple[Tensor | None, Tensor | None],
    eps: float,
    outputs: tuple[Tensor, Tensor | None, Tensor | None],
    config: dict[str, int],
) -> Launch:
    """The launch that fills outputs = (out, q_rms, k_rms), the latter two None without norms."""
    layers, m, width = qkv.shape
    half = width // (heads + 2 * kv_heads) // 2
    strides = [(0,) if w is None else w.stride()[:1] for w in weights]
    return Launch(
        pack_heads_fwd_kernel,
        (layers * triton.cdiv(m, config["BLOCK_M"]), heads + 2 * kv_heads),
        (qkv, *weights, *tables, *outputs, *strides, m, heads, kv_heads, _rows(tables[0]), half, float(eps)),
        {"NORM": weights[0] is not None, "ROTARY": tables[0] is not None, **_block(half), **config},
    )


def backward_launch(
    grad: Tensor,
    heads: int,
    kv_heads: int,
    tables: tuple[Tensor | None, Tensor | None],
    d_qkv: Tensor,
    config: dict[str, int],
) -> Launch:
    """The launch that fills d_qkv."""
    layers, m, width = grad.shape
    half = width // 3 // heads // 2
    return Launch(
        pack_heads_bwd_kernel,
        (layers * triton.cdiv(m, config["BLOCK_M"]), heads + 2 * kv_heads),
        (grad, *tables, d_qkv, m, heads, kv_heads, _rows(tables[0]), half),
        {"ROTARY": tables[0] is not None, **_block(half), **config},
    )


def _rows(table: Tensor | None) -> int:
    return 1 if table is None else len(table)


def _block(half: int) -> dict[str, int]:
    return {"BLOCK_C": max(2, triton.next_power_of_2(half))}


def _check(packed, heads, kv_heads, count, cos, sin) -> int:
    """The width of a head."""
    if packed.dim() != 3 or heads % kv_heads or packed.shape[2] % (2 * count) or not packed.is_contiguous():
        got = f"{tuple(packed.shape)} with strides {packed.stride()}"
        raise ValueError(f"{got}: expected [J, M, {count} hd] contiguous, hd even, kv_heads a divisor of heads")
    width = packed.shape[2] // count
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        if table.dim() != 2 or table.shape[1] * 2 != width or packed.shape[1] % len(table):
            raise ValueError(f"{name} has shape {tuple(table.shape)}, expected [R, {width // 2}], R a divisor of M")
        check(name, table, tuple(table.shape), like=packed)
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    return width


def _config_of(packed: Tensor, width: int) -> dict[str, int]:
    layers, m, _ = packed.shape
    return dispatch.config("pack_heads", width, m, layers, packed.dtype, packed.device) or default_config(width)


@library.custom_op("mlpint::pack_heads", mutates_args=())
def pack_heads(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention takes, of the queries, keys and values of J layers.

    Args:
        qkv: [J, M, (H + 2 K) hd], contiguous, hd even; float32, bfloat16 or float16.
        heads, kv_heads: H and K, a divisor of H.
        q_weight, k_weight: [J, hd], of an RMSNorm over each query's and key's channels; None: there is none.
        cos, sin: [R, hd / 2] in qkv's dtype, R a divisor of M: row m's channels (c, c + hd / 2) are turned by the
            table's row m % R. None: they are not.
        eps: of the norms.

    Returns:
        [J, M, 3 H hd]; 1 / root mean square of the queries, [J, M, H], and keys, [J, M, K], float32 ([J, 0] without
        norms).

    Raises:
        ValueError: a shape, dtype or layout that does not fit.
    """
    width = _check(qkv, heads, kv_heads, heads + 2 * kv_heads, cos, sin)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check(name, weight, (len(qkv), width), like=qkv)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together")
    out, q_rms, k_rms = outputs = _outputs(qkv, heads, kv_heads, q_weight)
    if out.numel():
        filled = (out, None, None) if q_weight is None else outputs
        config = _config_of(qkv, width)
        forward_launch(qkv, heads, kv_heads, (q_weight, k_weight), (cos, sin), eps, filled, config).run()
    return outputs


def _outputs(qkv, heads, kv_heads, q_weight):
    layers, m, width = qkv.shape
    out = qkv.new_empty(layers, m, 3 * heads * (width // (heads + 2 * kv_heads)))
    shapes = [(layers, 0)] * 2 if q_weight is None else [(layers, m, heads), (layers, m, kv_heads)]
    return out, *(qkv.new_empty(shape, dtype=torch.float32) for shape in shapes)


@pack_heads.register_fake
def _(qkv, heads, kv_heads, q_weight, k_weight, cos, sin, eps=1e-5):
    return _outputs(qkv, heads, kv_heads, q_weight)


@library.custom_op("mlpint::pack_heads_backward", mutates_args=())
def pack_heads_backward(grad: Tensor, heads: int, kv_heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """The gradient for what :func:`pack_heads` turned and copied: for qkv, or behind the norms where there are some.

    Args:
        grad: of what it gave, [J, M, 3 H hd], contiguous.
        heads, kv_heads, cos, sin: as there.

    Returns:
        [J, M, (H + 2 K) hd].

    Raises:
        ValueError: a shape, dtype or layout that does not fit.
    """
    width = _check(grad, heads, kv_heads, 3 * heads, cos, sin)
    d_qkv = _qkv_like(grad, heads, kv_heads)
    if grad.numel():
        backward_launch(grad, heads, kv_heads, (cos, sin), d_qkv, _config_of(grad, width)).run()
    return d_qkv


def _qkv_like(grad, heads, kv_heads):
    return grad.new_empty(*grad.shape[:2], (heads + 2 * kv_heads) * (grad.shape[2] // 3 // heads))


@pack_heads_backward.register_fake
def _(grad, heads, kv_heads, cos, sin):
    return _qkv_like(grad, heads, kv_heads)


def aot_launches(candidates: bool = False):
    """The launches that `mlpint.kernels.aot` compiles: Llama's and Qwen3's, and grouped queries alone."""
    layers, m, heads, kv_heads, width = 2, 512, 8, 2, 64
    for dtype in (torch.bfloat16, torch.float32):
        qkv = torch.empty(layers, m, (heads + 2 * kv_heads) * width, dtype=dtype, device="meta")
        out = torch.empty(layers, m, 3 * heads * width, dtype=dtype, device="meta")
        weight, table = (torch.empty(n, w, dtype=dtype, device="meta") for n, w in ((layers, width), (128, width // 2)))
        rms = torch.empty(layers, m, heads, device="meta")
        none, tables, norms = (None, None), (table, table), (weight, weight)
        for config in configs(width) if candidates else [default_config(width)]:
            yield forward_launch(qkv, heads, kv_heads, none, tables, 1e-5, (out, None, None), config)
            yield forward_launch(qkv, heads, kv_heads, norms, tables, 1e-5, (out, rms, rms), config)
            yield forward_launch(qkv, heads, kv_heads, none, none, 1e-5, (out, None, None), config)
            yield backward_launch(out, heads, kv_heads, tables, qkv, config)
            yield backward_launch(out, heads, kv_heads, none, qkv, config)
