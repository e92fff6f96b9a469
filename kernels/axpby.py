"""``a x + b y`` and its squared norm in one pass: the solver's corrections and residuals.

The norm stays on the device, a float32 scalar: nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from . import dispatch
from .common import Launch, check, check_dense, round_to, strides_of, to_float


@triton.jit
def axpby_norm_kernel(
    x,  # [J, M, D]
    y,  # [J, M, D]
    out,  # [J, M, D], dense
    partial,  # [J, programs], squared norm
    x_strides,  # (J, M)
    y_strides,
    a,
    b,
    N,  # M D
    D,
    DENSE: tl.constexpr,  # no gaps between rows: one layer is N elements in a row
    BLOCK: tl.constexpr,
):
    j = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < N
    if DENSE:
        x_offsets = offsets
        y_offsets = offsets
    else:
        x_offsets = offsets // D * x_strides[1] + offsets % D
        y_offsets = offsets // D * y_strides[1] + offsets % D
    xs = to_float(tl.load(x + j * x_strides[0] + x_offsets, mask=mask, other=0.0))
    ys = to_float(tl.load(y + j * y_strides[0] + y_offsets, mask=mask, other=0.0))
    stored = round_to(a * xs + b * ys, out.dtype.element_ty)
    tl.store(out + j * N + offsets, stored, mask=mask)
    value = tl.where(mask, to_float(stored), 0.0)
    tl.store(partial + j * tl.num_programs(0) + tl.program_id(0), tl.sum(value * value, 0).to(tl.float32))


def axpby_norm_reference(a: float, x: Tensor, b: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`axpby_norm` does, in plain PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = (a * x.to(wide) + b * y.to(wide)).to(x.dtype)
    return out, out.to(wide).square().sum().float()


def default_config() -> dict[str, int]:
    """The configuration of a launch for which no tuned one is known."""
    return {"BLOCK": 4096, "num_warps": 8}


def configs() -> list[dict[str, int]]:
    """Candidates to tune over."""
    candidates = ((512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8))
    return [{"BLOCK": block, "num_warps": warps} for block, warps in candidates]


@library.custom_op("mlpint::axpby_norm", mutates_args=())
def axpby_norm(a: float, x: Tensor, b: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """``a x + b y`` and its squared 2-norm.

    Args:
        a, b: factors.
        x, y: [J, ..., D] alike in shape and dtype; the dimensions between the first and the last lie evenly spaced.

    Returns:
        The sum, rounded once to the dtype of `x`, and the squared norm of what was stored over all elements: a float32
        scalar on the device, added up in an order that depends on the shape alone.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    check("y", y, tuple(x.shape), like=x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = {"x": rows_of("x", x), "y": rows_of("y", y)}
    if not x.numel():
        return out, x.new_zeros((), dtype=torch.float32)
    j, m, d = rows["x"].shape
    config = dispatch.config("axpby_norm", d, m, j, x.dtype, x.device) or default_config()
    launch, partial = launch_of(a, rows["x"], b, rows["y"], out, config)
    launch.run()
    return out, partial.sum()


@axpby_norm.register_fake
def _(a, x, b, y):
    return x.new_empty(x.shape), x.new_empty((), dtype=torch.float32)


def rows_of(name: str, x: Tensor) -> Tensor:
    """`x` [J, ..., D] as a view [J, M, D] whose last stride is 1; a vector counts as one row."""
    if x.dim() < 3:
        x = x.reshape(1, 1, -1) if x.dim() < 2 else x[:, None]
    check_dense(name, x)
    try:
        return x.view(x.shape[0], -1, x.shape[-1]) if x.numel() else x
    except RuntimeError:
        raise ValueError(f"{name} has strides {x.stride()}: rows must be evenly spaced, copy it") from None


def launch_of(a: float, x: Tensor, b: float, y: Tensor, out: Tensor, config: dict[str, int]) -> tuple[Launch, Tensor]:
    """The launch for x, y [J, M, D], and the partial sums of the squared norm that it writes."""
    j, m, d = x.shape
    dense = [t.stride(1) == d or m == 1 for t in (x, y)]
    if all(dense) and all(t.stride(0) == m * d for t in (x, y)):
        j, m = 1, j * m  # one long layer: no ends to mask within
    n = m * d
    partial = torch.empty(j, triton.cdiv(n, config["BLOCK"]), dtype=torch.float32, device=x.device)
    return (
        Launch(
            axpby_norm_kernel,
            (partial.shape[1], j),
            (x, y, out, partial, *strides_of(x, y), a, b, n, d),
            {"DENSE": all(dense)} | config,
        ),
        partial,
    )


def aot_launches(candidates: bool = False) -> Iterator[Launch]:
    """The launches that `mlpint.kernels.aot` compiles."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(16, 256, 256, dtype=dtype, device="meta")
        for config in configs() if candidates else [default_config()]:
            yield launch_of(0.5, x, -1.0, x, x, config)[0]
        padded = torch.empty(16, 256, 320, dtype=dtype, device="meta")[..., :256]
        yield launch_of(0.5, padded, -1.0, x, x, default_config())[0]
