"""Prolongation averaging over stacked parameters: ``fine <- (1 - delta) fine + delta coarse`` for chosen layers.

All tensors of a block go in one launch that reads each value once and, in the same pass, writes a shadow in a narrower
dtype and sums the squared change. A second, tiny launch adds the partial sums up, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from . import dispatch
from .common import Launch, round_to, to_float

MAX_TENSORS = 16  # tensors in one launch: a transformer block has 12; the addresses are arguments of the kernel
ALIGNMENT = 16  # bytes of one vector load


@triton.jit
def _at(address, dtype: tl.constexpr, ALIGN: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGN > 1 else pointer


@triton.jit
def average_kernel(
    partial,  # [programs], squared change
    fine,  # tuple of N pointers to [L, size]
    coarse,  # tuple of N pointers to [layers, size]
    shadow,  # tuple of N pointers to [L, size]
    sizes,  # tuple of N: elements of one layer
    fine_strides,  # tuples of N: elements from one averaged layer to the next
    coarse_strides,
    shadow_strides,
    layers,
    delta,
    N: tl.constexpr,
    SHADOW: tl.constexpr,
    ALIGN: tl.constexpr,  # all addresses, sizes and strides are multiples of this many elements
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    # Selecting this program's tensor costs a few scalar instructions, and no table in memory.
    first = 0
    start = 0
    size = sizes[0]
    x_address, x_stride = fine[0].to(tl.int64), fine_strides[0]
    y_address, y_stride = coarse[0].to(tl.int64), coarse_strides[0]
    if SHADOW:
        z_address, z_stride = shadow[0].to(tl.int64), shadow_strides[0]
    for i in tl.static_range(1, N):
        start += layers * tl.cdiv(sizes[i - 1], BLOCK)
        mine = pid >= start
        first = tl.where(mine, start, first)
        size = tl.where(mine, sizes[i], size)
        x_address, x_stride = tl.where(mine, fine[i].to(tl.int64), x_address), tl.where(mine, fine_strides[i], x_stride)
        y_address = tl.where(mine, coarse[i].to(tl.int64), y_address)
        y_stride = tl.where(mine, coarse_strides[i], y_stride)
        if SHADOW:
            z_address = tl.where(mine, shadow[i].to(tl.int64), z_address)
            z_stride = tl.where(mine, shadow_strides[i], z_stride)
    if ALIGN > 1:
        size = tl.multiple_of(size, ALIGN)
    blocks = tl.cdiv(size, BLOCK)
    layer = ((pid - first) // blocks).to(tl.int64)
    offsets = (pid - first) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < size

    x_type: tl.constexpr = fine[0].dtype.element_ty
    y_type: tl.constexpr = coarse[0].dtype.element_ty
    x_bytes: tl.constexpr = x_type.primitive_bitwidth // 8
    y_bytes: tl.constexpr = y_type.primitive_bitwidth // 8
    x_ptr = _at(x_address + layer * x_stride * x_bytes, x_type, ALIGN)
    y_ptr = _at(y_address + layer * y_stride * y_bytes, y_type, ALIGN)
    x = to_float(tl.load(x_ptr + offsets, mask=mask, other=0.0))
    y = to_float(tl.load(y_ptr + offsets, mask=mask, other=0.0)).to(x.dtype)
    # As torch.lerp does: exact at both ends.
    new = tl.where(delta < 0.5, x + delta * (y - x), y - (1 - delta) * (y - x))
    stored = round_to(new, x_type)
    tl.store(x_ptr + offsets, stored, mask=mask)
    if SHADOW:
        z_type: tl.constexpr = shadow[0].dtype.element_ty
        z_bytes: tl.constexpr = z_type.primitive_bitwidth // 8
        z_ptr = _at(z_address + layer * z_stride * z_bytes, z_type, ALIGN)
        tl.store(z_ptr + offsets, round_to(to_float(stored), z_type), mask=mask)
    change = to_float(stored) - x
    tl.store(partial + pid, tl.sum(change * change, 0).to(tl.float32))


@triton.jit
def average_sum_kernel(
    partial,  # [programs]
    total,  # [N]
    sizes,
    layers,
    N: tl.constexpr,
    BLOCK: tl.constexpr,  # of average_kernel
    SUM: tl.constexpr,
):
    tensor = tl.program_id(0)
    first = 0
    last = layers * tl.cdiv(sizes[0], BLOCK)
    for i in tl.static_range(1, N):
        mine = tensor >= i
        first = tl.where(mine, last, first)
        last = tl.where(mine, last + layers * tl.cdiv(sizes[i], BLOCK), last)
    sums = tl.zeros((SUM,), tl.float32)
    for start in range(first, last, SUM):
        offsets = start + tl.arange(0, SUM)  # [SUM]
        sums += tl.load(partial + offsets, mask=offsets < last, other=0.0)
    tl.store(total + tensor, tl.sum(sums, 0))


def average_reference(
    fine: Sequence[Tensor],
    coarse: Sequence[Tensor],
    layers: slice,
    delta: float,
    shadow: Sequence[Tensor] | None = None,
) -> Tensor:
    """What :func:`average_` does, in plain PyTorch."""
    total = []
    for i, (f, c) in enumerate(zip(fine, coarse, strict=True)):
        wide = torch.promote_types(f.dtype, torch.float32)
        new = torch.lerp(f[layers].to(wide), c.to(wide), delta).to(f.dtype)
        total.append((new.to(wide) - f[layers].to(wide)).square().sum().float())
        f[layers] = new
        if shadow is not None:
            shadow[i][layers] = new.to(shadow[i].dtype)
    return torch.stack(total)


def default_config() -> dict[str, int]:
    """The configuration of a launch for which no tuned one is known."""
    return {"BLOCK": 4096, "num_warps": 8}


def configs() -> list[dict[str, int]]:
    """Candidates to tune over."""
    return [
        {"BLOCK": b, "num_warps": w} for b, w in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8), (8192, 16))
    ]


def average_(
    fine: Sequence[Tensor],
    coarse: Sequence[Tensor],
    layers: slice,
    delta: float,
    shadow: Sequence[Tensor] | None = None,
) -> Tensor:
    """``fine[i][layers] <- (1 - delta) fine[i][layers] + delta coarse[i]`` for a list of stacked parameters, in place.

    Args:
        fine: tensors [L, ...] of one dtype; the storage of one layer is dense, layers may lie any distance apart.
        coarse: tensors [len(range(L)[layers]), ...] of one dtype, else like `fine`.
        layers: which layers of `fine` the layers of `coarse` are, in steps of 1 or more.
        delta: weight of the coarse values; 0 keeps the fine ones, 1 takes the coarse ones exactly.
        shadow: tensors like `fine`, usually bfloat16, that receive a rounded copy of the averaged layers.

    Returns:
        float32 [len(fine)] on the device: the squared 2-norm of each tensor's change, as stored.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    if layers.step is not None and layers.step < 1:
        raise ValueError(f"layers has step {layers.step}, expected at least 1")
    if not fine:
        raise ValueError("fine is empty: pass at least one stacked tensor")
    chosen = range(fine[0].shape[0])[layers]  # not slice.indices, which torch.compile of 2.11 cannot trace
    lists = {"fine": fine, "coarse": coarse} | ({} if shadow is None else {"shadow": shadow})
    for name, tensors in lists.items():
        _check(name, tensors, fine, len(chosen) if name == "coarse" else None)
    with torch.no_grad():  # leaves that require grad are what is averaged
        return torch.ops.mlpint.average_(fine, coarse, chosen.start, chosen.step, delta, shadow or ())


def _check(name: str, tensors: Sequence[Tensor], fine: Sequence[Tensor], count: int | None) -> None:
    if len(tensors) != len(fine):
        raise ValueError(f"{name} has {len(tensors)} tensors, fine has {len(fine)}: pass one for each")
    for i, (tensor, like) in enumerate(zip(tensors, fine, strict=True)):
        shape = (fine[0].shape[0] if count is None else count, *like.shape[1:])
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != tensors[0].dtype or tensor.device != fine[0].device:
            got, expected = f"{tensor.dtype} on {tensor.device}", f"{tensors[0].dtype} on {fine[0].device}"
            raise ValueError(f"{name}[{i}] is {got}, expected {expected}: average the tensors of one dtype at a time")
        if shape[0] and not tensor[0].is_contiguous():
            raise ValueError(
                f"{name}[{i}] has strides {tensor.stride()}, expected dense layers: store it [L, ...] dense"
            )


@library.custom_op("mlpint::average_", mutates_args=("fine", "shadow"))
def _average_op(
    fine: Sequence[Tensor],
    coarse: Sequence[Tensor],
    start: int,
    step: int,
    delta: float,
    shadow: Sequence[Tensor],
) -> Tensor:
    total = fine[0].new_zeros(len(fine), dtype=torch.float32)
    config = dispatch.config("average", *_shape(fine, coarse), fine[0].dtype, fine[0].device) or default_config()
    for launch in launches(fine, coarse, start, step, delta, shadow, total, config):
        launch.run()
    return total


@_average_op.register_fake
def _(fine, coarse, start, step, delta, shadow):
    return fine[0].new_empty(len(fine), dtype=torch.float32)


def _shape(fine: Sequence[Tensor], coarse: Sequence[Tensor]) -> tuple[int, int, int]:
    """(d, m, j) of the table of tuned configurations: the longest layer as rows of the shortest, times the layers."""
    sizes = [f[0].numel() for f in fine]
    return min(sizes), max(sizes) // max(min(sizes), 1), len(coarse[0])


def launches(
    fine: Sequence[Tensor],
    coarse: Sequence[Tensor],
    start: int,
    step: int,
    delta: float,
    shadow: Sequence[Tensor],
    total: Tensor,
    config: dict[str, int],
) -> Iterator[Launch]:
    """The launches that average: two for every MAX_TENSORS tensors."""
    layers = len(coarse[0])
    block = config["BLOCK"]
    for first in range(0, len(fine) if layers else 0, MAX_TENSORS):
        chosen = slice(first, first + MAX_TENSORS)
        x = tuple(f[start::step] for f in fine[chosen])
        y = tuple(coarse[chosen])
        z = tuple(s[start::step] for s in shadow[chosen]) or x  # not read without a shadow
        sizes = tuple(c[0].numel() for c in y)
        programs = layers * sum(triton.cdiv(size, block) for size in sizes)
        if not programs:
            continue
        partial = torch.empty(programs, dtype=torch.float32, device=total.device)
        constexprs = {"N": len(x), "BLOCK": block}
        yield Launch(
            average_kernel,
            (programs,),
            (partial, x, y, z, sizes, *(tuple(t.stride(0) for t in ts) for ts in (x, y, z)), layers, delta),
            constexprs | {"SHADOW": z is not x, "ALIGN": _alignment((*x, *y, *z)), "num_warps": config["num_warps"]},
        )
        yield Launch(
            average_sum_kernel,
            (len(x),),
            (partial, total[chosen], sizes, layers),
            constexprs | {"SUM": 4096, "num_warps": 8},
        )


def _alignment(tensors: Sequence[Tensor]) -> int:
    """Elements that addresses, strides and sizes of a layer are all multiples of, for vector loads; 1 if none."""
    widest = max(ALIGNMENT // t.element_size() for t in tensors)
    aligned = all(
        t.data_ptr() % ALIGNMENT == 0 and t.stride(0) * t.element_size() % ALIGNMENT == 0 and t[0].numel() % widest == 0
        for t in tensors
    )
    return widest if aligned else 1


def aot_launches(candidates: bool = False) -> Iterator[Launch]:
    """The launches that `mlpint.kernels.aot` compiles: the parameters of a block in one launch."""
    d, layers = 256, 8
    shapes = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    total = torch.empty(len(shapes), device="meta")
    for dtype, shadow_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, None)):
        fine = [torch.empty(layers, *s, dtype=dtype, device="meta") for s in shapes]
        coarse = [f[::2] for f in fine]
        shadow = [torch.empty_like(f, dtype=shadow_dtype) for f in fine if shadow_dtype]
        for config in configs() if candidates else [default_config()]:
            yield from launches(fine, coarse, 0, 2, 0.25, shadow, total, config)
