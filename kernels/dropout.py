"""Dropout whose mask is a function of a key, a place and an element alone, by Philox inside the kernel.

An element of row r and column c of a tensor [R, C] is number c % 8 of eight draws of 16 bits that one call of
Philox-4x32 gives, with the key as its seed and r ceil(C / 8) + c / 8 as its counter. Nothing is kept for a backward: it
makes the mask again. Attention with dropout takes its weights' mask from the same function, tile by tile.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from .common import Launch, round_to, to_float
from .draws import LEVELS, factor_of

DRAWS = tl.constexpr(8)  # of one call
_PLACE_SHIFT = tl.constexpr(56)  # places are the counter's upper bits


@triton.jit
def draws_of(seed, place, rows, first, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The draws [ROWS, COLUMNS], 0 to 65535, of some rows and as many columns from `first` on, a multiple of 8.

    `columns` is how many there are in all; ROWS and COLUMNS are powers of 2, the latter at least 8.
    """
    groups = first // DRAWS + tl.arange(0, COLUMNS // DRAWS)
    counter = rows.to(tl.int64)[:, None] * tl.cdiv(columns, DRAWS) + groups[None, :]
    counter += (tl.zeros_like(counter) + place) << _PLACE_SHIFT
    a, b, c, d = tl.randint4x(seed, counter)  # [R, C / 8] each
    words = tl.join(tl.join(a, b), tl.join(c, d))  # [R, C / 8, 2, 2]
    draws = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    return tl.reshape(draws, (ROWS, COLUMNS))


@triton.jit
def dropout_kernel(
    out,  # [J, R, C], dense
    update,  # [J, R, C], dense; None: the mask itself is wanted
    y,  # [J, R, C], dense but for the strides of J; None: no step
    x,
    seeds,  # [J]
    y_stride,
    x_stride,
    place,
    levels,
    factor,
    h,
    R,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    layer = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * BLOCK_C
    columns = first + tl.arange(0, BLOCK_C)
    draws = draws_of(tl.load(seeds + layer), place, rows, first, C, BLOCK_R, BLOCK_C)
    new = tl.where(draws >= levels, factor, 0.0)  # [BR, BC]
    mask = (rows < R)[:, None] & (columns < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    layer = layer.to(tl.int64)
    dense = layer * R * C
    if update is not None:
        new = new * to_float(tl.load(update + dense + at, mask=mask, other=0.0))
    if y is not None:
        old = to_float(tl.load(x + layer * x_stride + at, mask=mask, other=0.0))
        new = (1.0 - h) * old + h * (to_float(tl.load(y + layer * y_stride + at, mask=mask, other=0.0)) + new)
    tl.store(out + dense + at, round_to(new, out.dtype.element_ty), mask=mask)


# --- the same in plain PyTorch ----------------------------------------------------------------------------------------

_ROUND_A, _ROUND_B, _KEY_A, _KEY_B, _LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox_reference(seed: int, counter: Tensor) -> tuple[Tensor, ...]:
    """Four words of 32 bits, in int64, for each counter of 64 bits."""
    a, b, c, d = counter & _LOW, (counter >> 32) & _LOW, torch.zeros_like(counter), torch.zeros_like(counter)
    low, high = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        a, b, c, d = (
            _high(c, _ROUND_B) ^ b ^ low,
            _times(c, _ROUND_B),
            _high(a, _ROUND_A) ^ d ^ high,
            _times(a, _ROUND_A),
        )
        low, high = (low + _KEY_A) & _LOW, (high + _KEY_B) & _LOW
    return a, b, c, d


def _times(x: Tensor, factor: int) -> Tensor:
    """The lower 32 bits of a product of words; in halves, which do not overflow int64."""
    return ((x & 0xFFFF) * factor + (((x >> 16) * factor & 0xFFFF) << 16)) & _LOW


def _high(x: Tensor, factor: int) -> Tensor:
    """The upper 32 bits of it."""
    return ((x >> 16) * factor + ((x & 0xFFFF) * factor >> 16)) >> 16


def draws_reference(seed: int, place: int, rows: int, columns: int) -> Tensor:
    """The draws [rows, columns] of :func:`draws_of`."""
    groups = -(-columns // 8)
    counter = torch.arange(rows * groups) + (place << 56)
    a, b, c, d = philox_reference(seed, counter)
    halves = [w for word in (a, c, b, d) for w in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).view(rows, 8 * groups)[:, :columns]


def mask_reference(seeds: Tensor, place: int, rows: int, columns: int, levels: int) -> Tensor:
    """What :func:`dropout_mask` gives, in float64 on the CPU."""
    draws = torch.stack([draws_reference(seed, place, rows, columns) for seed in seeds.tolist()])
    return (draws >= levels).double() * factor_of(levels)


# --- launches ---------------------------------------------------------------------------------------------------------


def launch_of(
    update: Tensor | None,
    y: Tensor | None,
    x: Tensor | None,
    out: Tensor,
    seeds: Tensor,
    place: int,
    levels: int,
    h: float,
) -> Launch:
    """The launch that fills `out` [J, R, C]."""
    layers, rows, columns = out.shape
    width = min(1024, max(8, triton.next_power_of_2(columns)))
    height = max(1, 2048 // width)
    strides = (0, 0) if y is None or x is None else (y.stride(0), x.stride(0))
    return Launch(
        dropout_kernel,
        (triton.cdiv(rows, height), triton.cdiv(columns, width), layers),
        (out, update, y, x, seeds, *strides, place, levels, factor_of(levels), float(h), rows, columns),
        {"BLOCK_R": height, "BLOCK_C": width, "num_warps": 4},
    )


def check_seeds(x: Tensor, seeds: Tensor, levels: int) -> None:
    """Raise ValueError unless these can be dropout's for x [J, ...]."""
    if seeds.dtype != torch.int64 or tuple(seeds.shape) != x.shape[:1] or seeds.device != x.device:
        raise ValueError(f"seeds is {seeds.dtype} {list(seeds.shape)} on {seeds.device}, expected int64 [{len(x)}]")
    if not 0 <= levels < LEVELS:
        raise ValueError(f"levels = {levels}: must be in [0, {LEVELS})")


def _run(update, y, x, out, seeds, place, levels, h) -> Tensor:
    if out.dim() != 3:
        raise ValueError(f"the tensor is {tuple(out.shape)}, expected [J, R, C]")
    check_seeds(out, seeds, levels)
    if out.numel():
        launch_of(update, y, x, out, seeds, place, levels, h).run()
    return out


@library.custom_op("mlpint::dropout_mask", mutates_args=())
def dropout_mask(seeds: Tensor, place: int, rows: int, columns: int, levels: int, dtype: torch.dtype) -> Tensor:
    """Factors [J, rows, columns] of J layers: 0 where an element is dropped, elsewhere what keeps the mean.

    Args:
        seeds: [J] keys of 64 bits, in int64.
        place: 0 to 255; where in a layer this is.
        rows, columns: of one layer's tensor.
        levels: how many of 65536 draws drop an element.
        dtype: of the result.

    Raises:
        ValueError: seeds or levels that do not fit.
    """
    out = torch.empty(len(seeds), rows, columns, dtype=dtype, device=seeds.device)
    return _run(None, None, None, out, seeds, place, levels, 1.0)


@library.custom_op("mlpint::drop", mutates_args=())
def drop(update: Tensor, seeds: Tensor, place: int, levels: int) -> Tensor:
    """`update` [J, R, C] times :func:`dropout_mask`, in one pass; it is its own adjoint."""
    update = update.contiguous()
    return _run(update, None, None, torch.empty_like(update), seeds, place, levels, 1.0)


@library.custom_op("mlpint::drop_step", mutates_args=())
def drop_step(update: Tensor, y: Tensor, x: Tensor, seeds: Tensor, place: int, levels: int, h: float) -> Tensor:
    """x + h ((y - x) + :func:`drop` of update), in one pass: all [J, R, C], of y's and x's dtype."""
    if not update.shape == y.shape == x.shape or y.dtype != x.dtype:
        got = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (update, y, x))
        raise ValueError(f"update, y, x are {got}: must be of one shape, y and x of one dtype")
    y, x = (t if t[0].is_contiguous() else t.contiguous() for t in (y, x))
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return _run(update.contiguous(), y, x, out, seeds, place, levels, h)


@dropout_mask.register_fake
def _(seeds, place, rows, columns, levels, dtype):
    return torch.empty(len(seeds), rows, columns, dtype=dtype, device=seeds.device)


@drop.register_fake
def _(update, seeds, place, levels):
    return torch.empty_like(update, memory_format=torch.contiguous_format)


@drop_step.register_fake
def _(update, y, x, seeds, place, levels, h):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def aot_launches(candidates: bool = False) -> Iterator[Launch]:
    """The launches that `mlpint.kernels.aot` compiles: the mask alone, a product, a step."""
    seeds = torch.empty(4, dtype=torch.int64, device="meta")
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(4, 512, 768, dtype=dtype, device="meta")
        for update, y in ((None, None), (x, None), (x, x)):
            yield launch_of(update, y, y, x, seeds, 2, 6554, 0.5)
