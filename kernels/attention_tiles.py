"""What the attention kernels share: where heads and tiles lie, how long a sequence is, checks and constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .common import check, check_dense, input_precision, round_to
from .draws import factor_of
from .dropout import check_seeds, draws_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def block_of(T, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(head, first token) of a program of a one-dimensional grid of J x B x H x blocks(T).

    With LAST_FIRST the programs of a head begin at its end: under a causal mask the last queries have most to do.
    """
    blocks = tl.cdiv(T, BLOCK)
    block = tl.program_id(0) % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    return tl.program_id(0) // blocks, block * BLOCK


@triton.jit
def head_of(pointer, strides, head, B, H):
    """The address where head number `head` of J x B x H starts."""
    j, b, h = head // (B * H), head // H % B, head % H
    return pointer + j.to(tl.int64) * strides[0] + b.to(tl.int64) * strides[1] + h.to(tl.int64) * strides[2]


@triton.jit
def length_of(lengths, strides, head, B, H, T, LENGTHS: tl.constexpr):
    """Tokens of the sequence that a head belongs to."""
    n = T
    if LENGTHS:
        j, b = head // (B * H), head // H % B
        n = tl.load(lengths + j.to(tl.int64) * strides[0] + b.to(tl.int64) * strides[1])
        n = tl.minimum(tl.maximum(n, 0), T)
    return n


@triton.jit
def tile_at(head, stride, start, limit, HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The addresses and mask of a tile [BLOCK, BLOCK_D] of one head: tokens from `start`, those before `limit`."""
    tokens = start + tl.arange(0, BLOCK).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    mask = (tokens < limit)[:, None]
    if HEAD < BLOCK_D:
        mask = mask & (channels < HEAD)[None, :]
    return head + tokens[:, None] * stride + channels[None, :], mask


@triton.jit
def load_tile(head, stride, start, limit, HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a tile [BLOCK, BLOCK_D], zero at and beyond `limit`."""
    at, mask = tile_at(head, stride, start, limit, HEAD, BLOCK, BLOCK_D)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_tile(head, stride, start, limit, values, HEAD: tl.constexpr):
    """Store values [BLOCK, BLOCK_D], those before `limit`."""
    at, mask = tile_at(head, stride, start, limit, HEAD, values.shape[0], values.shape[1])
    tl.store(at, round_to(values, head.dtype.element_ty), mask=mask)


@triton.jit
def kept_factors(dropping, rows, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What the weights [ROWS, COLUMNS] of queries, by their rows among all of a layer, and keys are multiplied by."""
    seed, place, levels, factor, tokens = dropping
    return tl.where(draws_of(seed, place, rows, first, tokens, ROWS, COLUMNS) >= levels, factor, 0.0)


def empty_heads(q: Tensor) -> Tensor:
    """New heads [J, B, H, T, hd], a view of dense [J, B, T, H, hd]: what the next linear layer reads."""
    j, b, h, t, d = q.shape
    return q.new_empty(j, b, t, h, d).transpose(2, 3)


def check_heads(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    """Raise ValueError unless the kernels can take these heads and key lengths."""
    if q.dim() != 5 or q.shape[4] > dispatch.WIDEST_HEAD:
        widest = dispatch.WIDEST_HEAD
        raise ValueError(f"q has shape {tuple(q.shape)}, expected [J, B, H, T, head dimension <= {widest}]")
    check_dense("q", q)
    check("k", k, tuple(q.shape), like=q)
    check("v", v, tuple(q.shape), like=q)
    if lengths is None:
        return
    expected = f"int32 [{q.shape[0]}, {q.shape[1]}] or [{q.shape[1]}] on {q.device}"
    if lengths.dtype != torch.int32 or lengths.device != q.device or lengths.shape not in (q.shape[:2], q.shape[1:2]):
        raise ValueError(f"lengths is {lengths.dtype} {list(lengths.shape)} on {lengths.device}, expected {expected}")


class Dropping(NamedTuple):
    """Dropout of the weights, as :func:`mlpint.kernels.dropout.dropout_mask` takes it; without seeds there is none."""

    seeds: Tensor | None = None
    place: int = 0
    levels: int = 0

    @property
    def numbers(self) -> tuple[int, int, float]:
        """What kernels are given beside the seeds: place, levels, factor."""
        return self.place, self.levels, factor_of(self.levels)

    def check(self, q: Tensor) -> None:
        """Raise ValueError unless this can be of such heads."""
        if self.seeds is not None:
            check_seeds(q, self.seeds, self.levels)
        elif self.levels:
            raise ValueError(f"levels = {self.levels} without seeds")


NOTHING_DROPPED = Dropping()


def real_and_seen(q: Tensor, causal: bool, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The masks of the references: tokens that exist, [J, B, 1, T], and keys that a query sees, [J, B, 1, T, T]."""
    token = torch.arange(q.shape[3], device=q.device)
    real = torch.ones_like(token, dtype=torch.bool).expand(*q.shape[:2], 1, -1)
    if lengths is not None:
        real = (token < lengths[..., None]).expand(*q.shape[:2], -1)[:, :, None]
    seen = real[..., None, :] & real[..., None]
    return real, seen & (token[:, None] >= token) if causal else seen


def constants(q: Tensor, causal: bool, lengths: Tensor | None, dropping: Dropping) -> dict:
    """The constexpr parameters that the launch configuration does not decide."""
    return {
        "HEAD": q.shape[4],
        "BLOCK_D": padded_head(q),
        "CAUSAL": causal,
        "LENGTHS": lengths is not None,
        "DROPOUT": dropping.seeds is not None,
        "INPUT_PRECISION": input_precision(),
    }


def length_strides(lengths: Tensor | None) -> tuple[int, int]:
    """The strides (J, B); sequences of all layers are equally long where `lengths` is [B]."""
    if lengths is None:
        return 0, 0
    return lengths.stride(0) if lengths.dim() == 2 else 0, lengths.stride(-1)


Config = Callable[[int, int, torch.dtype], dict[str, int]]


def config_of(op: str, q: Tensor, default: Config, dropping: Dropping, with_dropout: Config) -> dict[str, int]:
    """The launch configuration: d is the padded head dimension, m the tokens of a sequence, j all layers' heads.

    Tuned ones are for kernels without dropout, whose counters take registers."""
    j, b, h, t, _ = q.shape
    width = padded_head(q)
    if dropping.seeds is not None:
        return with_dropout(width, t, q.dtype)
    return dispatch.config(op, width, t, j * b * h, q.dtype, q.device) or default(width, t, q.dtype)


def padded_head(q: Tensor) -> int:
    """The head dimension that tiles have: a power of 2, and enough for a matrix instruction."""
    return max(16, triton.next_power_of_2(q.shape[4]))


def aot_cases(candidates: bool) -> Iterator[tuple[tuple[Tensor, ...], Tensor, bool, Tensor | None]]:
    """The cases ((q, k, v), lse, causal, lengths) on the meta device, for `mlpint.kernels.aot`."""
    j, b, h, t = 4, 3, 5, 512
    wide, narrow = torch.float32, torch.bfloat16
    cases = [(narrow, head, causal) for head in (32, 64, 80, 128) for causal in (True, False)]
    if not candidates:  # what takes fewer registers than another case
        cases = [case for case in cases if case[1:] not in ((32, True), (32, False), (80, False))]
    for dtype, head, causal in [*cases, (wide, 64, True), (wide, 128, False)]:
        heads = torch.empty(j, b, t, 3, h, head, dtype=dtype, device="meta").transpose(2, 4).unbind(3)
        lse, lengths = torch.empty(j, b, h, t, device="meta"), torch.empty(b, dtype=torch.int32, device="meta")
        yield heads, lse, causal, None if causal else lengths


def aot_dropping(q: Tensor, causal: bool) -> Dropping | None:
    """Dropout for one of these cases, if it is one that is compiled with it, too."""
    head = padded_head(q)
    if head not in (64, 128) or causal != (head == 64) or q.dtype != torch.bfloat16:
        return None
    return Dropping(torch.empty(len(q), dtype=torch.int64, device="meta"), 0, 6554)
