"""Backward of layer normalisation with the residual's gradient added, and the gradients of its weight and bias.

    dx = residual_grad + rstd (w dy - mean(w dy) - xhat mean(w dy xhat)),   xhat = (x - mean) rstd
    dweight = sum_m dy xhat,   dbias = sum_m dy

Of an RMSNorm, which is given no mean: without mean and mean(w dy), and without a bias.

Each program walks over a chunk of rows and keeps its part of the two sums in registers; a second launch adds the parts
up in a fixed order, so that the result is the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from . import dispatch
from .common import Launch, check, check_dense, distinct, round_to, strides_of, to_float

WIDEST = 16384  # a row is one block in registers


@triton.jit
def ln_backward_add_kernel(
    dy,  # [J, M, D]
    x,  # [J, M, D]
    mean,  # [J, M], dense, or None
    rstd,  # [J, M], dense
    weight,  # [J, D]
    residual_grad,  # [J, M, D]
    dx,  # [J, M, D], dense
    partial,  # [J, programs, 2, D]
    dy_strides,  # (J, M)
    x_strides,
    residual_strides,
    weight_strides,  # (J,)
    M,
    D,
    RMS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,  # of one program, a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    j = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)  # [BD]
    inside = cols < D
    w = to_float(tl.load(weight + j * weight_strides[0] + cols, mask=inside, other=0.0))[None, :]
    acc: tl.constexpr = partial.dtype.element_ty
    dw = tl.zeros((BLOCK_M, BLOCK_D), acc)
    db = tl.zeros((BLOCK_M, BLOCK_D), acc)
    first = tl.program_id(0) * ROWS
    for start in range(first, tl.minimum(first + ROWS, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)  # [BM]
        mask = (rows < M)[:, None] & inside[None, :]
        dy_at = dy + j * dy_strides[0] + rows[:, None] * dy_strides[1] + cols[None, :]
        x_at = x + j * x_strides[0] + rows[:, None] * x_strides[1] + cols[None, :]
        dys = to_float(tl.load(dy_at, mask=mask, other=0.0))  # [BM, BD]
        xs = to_float(tl.load(x_at, mask=mask, other=0.0))
        rs = tl.load(rstd + j * M + rows, mask=rows < M, other=0.0)[:, None]
        wdy = w * dys
        # Beyond D of no matter: dy and w are zero there.
        if RMS:
            xhat = xs * rs
            level = tl.zeros((BLOCK_M, 1), acc)
        else:
            xhat = (xs - tl.load(mean + j * M + rows, mask=rows < M, other=0.0)[:, None]) * rs
            level = tl.sum(wdy, 1)[:, None] / D
        along = tl.sum(wdy * xhat, 1)[:, None] / D
        dxs = rs * (wdy - level - xhat * along)
        if RESIDUAL:
            residual_at = residual_grad + j * residual_strides[0] + rows[:, None] * residual_strides[1] + cols[None, :]
            dxs += to_float(tl.load(residual_at, mask=mask, other=0.0))
        tl.store(dx + (j * M + rows[:, None]) * D + cols[None, :], round_to(dxs, dx.dtype.element_ty), mask=mask)
        dw += dys * xhat
        db += dys
    at = partial + (j * tl.num_programs(0) + tl.program_id(0)) * 2 * D + cols
    tl.store(at, tl.sum(dw, 0), mask=inside)
    tl.store(at + D, tl.sum(db, 0), mask=inside)


@triton.jit
def ln_backward_sum_kernel(
    partial,  # [J, P, 2, D]
    dweight,  # [J, D], dense
    dbias,  # [J, D], dense
    P,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    j = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BD]
    acc: tl.constexpr = partial.dtype.element_ty
    dw = tl.zeros((BLOCK_P, BLOCK_D), acc)
    db = tl.zeros((BLOCK_P, BLOCK_D), acc)
    for start in range(0, P, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)  # [BP]
        mask = (parts < P)[:, None] & (cols < D)[None, :]
        at = partial + (j * P + parts[:, None]) * 2 * D + cols[None, :]
        dw += tl.load(at, mask=mask, other=0.0)
        db += tl.load(at + D, mask=mask, other=0.0)
    out = j * D + cols
    tl.store(dweight + out, round_to(tl.sum(dw, 0), dweight.dtype.element_ty), mask=cols < D)
    tl.store(dbias + out, round_to(tl.sum(db, 0), dbias.dtype.element_ty), mask=cols < D)


def ln_backward_add_reference(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor, residual_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`ln_backward_add` does, in plain PyTorch."""
    wide = rstd.dtype
    dys = dy.to(wide)
    xhat = (x.to(wide) if mean is None else x.to(wide) - mean[..., None]) * rstd[..., None]
    wdy = weight.to(wide)[:, None] * dys
    level = 0 if mean is None else wdy.mean(-1, keepdim=True)
    dx = rstd[..., None] * (wdy - level - xhat * (wdy * xhat).mean(-1, keepdim=True))
    if residual_grad is not None:
        dx = dx + residual_grad.to(wide)
    return dx.to(x.dtype), (dys * xhat).sum(1).to(weight.dtype), dys.sum(1).to(weight.dtype)


def default_config(d: int, m: int, j: int) -> dict[str, int]:
    """The configuration of a launch for which no tuned one is known.

    Blocks have about 2048 elements, and rows make some 500 programs: four for each multiprocessor of an H100.
    """
    block_m = max(1, min(16, 2048 // triton.next_power_of_2(d)))
    chunks = triton.cdiv(triton.cdiv(m * j, 528), block_m)
    return {"BLOCK_M": block_m, "ROWS": block_m * max(1, chunks), "num_warps": 4 if d <= 2048 else 8}


def configs(d: int, m: int, j: int) -> list[dict[str, int]]:
    """Candidates to tune over."""
    default = default_config(d, m, j)
    candidates = []
    for block_m in {default["BLOCK_M"], max(1, default["BLOCK_M"] // 2), min(16, default["BLOCK_M"] * 2)}:
        for factor in (1, 2, 4):
            rows = block_m * triton.cdiv(max(default["ROWS"] // factor, 1), block_m)
            for warps in (4, 8):
                candidates.append({"BLOCK_M": block_m, "ROWS": rows, "num_warps": warps})
    return distinct(candidates)


@library.custom_op("mlpint::ln_backward_add", mutates_args=())
def ln_backward_add(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor, residual_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of J layer normalisations over D, plus the gradient that reaches `x` past them.

    Args:
        dy: gradient of the normalised output, [J, M, D].
        x: input of the normalisation, [J, M, D].
        mean, rstd: its mean and reciprocal standard deviation, [J, M], float32 (float64 where `x` is). Without a mean
            the norm is an RMSNorm, and dbias, which it has not, the sum over the rows of dy all the same.
        weight: [J, D].
        residual_grad: what is added to the gradient, [J, M, D], or None.

    Returns:
        (dx [J, M, D], dweight [J, D], dbias [J, D]), the latter two in the dtype of `weight`.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    _check(dy, x, mean, rstd, weight, residual_grad)
    j, m, d = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = (torch.empty(j, d, dtype=weight.dtype, device=x.device) for _ in range(2))
    if not x.numel():
        return dx, dweight.zero_(), dbias.zero_()
    config = dispatch.config("ln_backward_add", d, m, j, x.dtype, x.device) or default_config(d, m, j)
    for launch in launches(dy, x, mean, rstd, weight, residual_grad, dx, dweight, dbias, config):
        launch.run()
    return dx, dweight, dbias


@ln_backward_add.register_fake
def _(dy, x, mean, rstd, weight, residual_grad):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _check(dy, x, mean, rstd, weight, residual_grad) -> None:
    if x.dim() != 3 or x.shape[2] > WIDEST:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [J, M, D] with D at most {WIDEST}")
    check_dense("x", x)
    check("dy", dy, tuple(x.shape), like=x)
    if residual_grad is not None:
        check("residual_grad", residual_grad, tuple(x.shape), like=x)
    if tuple(weight.shape) != (x.shape[0], x.shape[2]):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {(x.shape[0], x.shape[2])}")
    check_dense("weight", weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic is None:
            continue
        if tuple(statistic.shape) != tuple(x.shape[:2]) or statistic.dtype != wide or not statistic.is_contiguous():
            got = f"{tuple(statistic.shape)} of {statistic.dtype} with strides {statistic.stride()}"
            raise ValueError(f"{name} is {got}, expected {tuple(x.shape[:2])} of {wide}, contiguous")


def launches(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor,
    residual_grad: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    config: dict[str, int],
) -> Iterator[Launch]:
    """The two launches: the gradient with partial sums for the parameters, and their sum."""
    j, m, d = x.shape
    rows = config["ROWS"]
    residual = x if residual_grad is None else residual_grad
    partial = torch.empty(j, triton.cdiv(m, rows), 2, d, dtype=rstd.dtype, device=x.device)
    yield Launch(
        ln_backward_add_kernel,
        (partial.shape[1], j),
        (dy, x, mean, rstd, weight, residual, dx, partial, *strides_of(dy, x, residual, weight), m, d),
        {"RMS": mean is None, "RESIDUAL": residual_grad is not None, "BLOCK_D": triton.next_power_of_2(d)} | config,
    )
    yield Launch(
        ln_backward_sum_kernel,
        (triton.cdiv(d, 32), j),
        (partial, dweight, dbias, partial.shape[1], d),
        {"BLOCK_P": 32, "BLOCK_D": 32, "num_warps": 4},
    )


def aot_launches(candidates: bool = False) -> Iterator[Launch]:
    """The launches that `mlpint.kernels.aot` compiles."""
    j, m = 4, 2048
    for dtype in (torch.bfloat16, torch.float32):
        for d in (128, 256, 1024, 4096):
            x = torch.empty(j, m, d, dtype=dtype, device="meta")
            mean, weight = torch.empty(j, m, device="meta"), torch.empty(2 * j, d, dtype=dtype, device="meta")[::2]
            for config in configs(d, m, j) if candidates else [default_config(d, m, j)]:
                yield from launches(x, x, mean, mean, weight, x, x, weight, weight, config)
                if d in (256, 4096):
                    yield from launches(x, x, None, mean, weight, x, x, weight, weight, config)
