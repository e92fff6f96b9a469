"""Linear map and residual step in one kernel: the attention's output projection, and the FFN's way down.

The step is (1 - h) x + h (y + a W^T + b), which is x + h ((y - x) + a W^T + b) and at h = 1 exactly y + a W^T + b.
J layers run in one launch; h is a run-time argument.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from . import dispatch
from .common import Launch, check, check_dense, dot, input_precision, round_to, strides_of, tile_of, to_float


@triton.jit
def store_step(acc, bias, y, x, out, rows, columns, y_stride, x_stride, M, N, h, SAME: tl.constexpr):
    """Store the step of an accumulator [BM, BN] without its bias; y, x and out point to one layer's [M, N]."""
    rows64 = rows.to(tl.int64)[:, None]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    if bias is not None:
        acc += to_float(tl.load(bias + columns, mask=columns < N, other=0.0))[None, :]
    old = to_float(tl.load(x + rows64 * x_stride + columns[None, :], mask=mask, other=0.0))  # [BM, BN]
    if SAME:
        new = old + h * acc
    else:
        inner = to_float(tl.load(y + rows64 * y_stride + columns[None, :], mask=mask, other=0.0))
        new = (1.0 - h) * old + h * (inner + acc)
    tl.store(out + rows64 * N + columns[None, :], round_to(new, out.dtype.element_ty), mask=mask)


@triton.jit
def linear_axpy_fwd_kernel(
    a,  # [J, M, K]
    weight,  # [J, N, K]
    bias,  # [J, N], or None
    y,  # [J, M, N]
    x,  # [J, M, N]
    out,  # [J, M, N], dense
    a_strides,  # (J, M)
    weight_strides,  # (J, N)
    bias_strides,  # (J,)
    y_strides,  # (J, M)
    x_strides,
    M,
    N,
    K,
    h,
    SAME: tl.constexpr,  # y is x
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    layer, pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_rows = a + layer * a_strides[0] + rows.to(tl.int64)[:, None] * a_strides[1]
    weight_rows = weight + layer * weight_strides[0] + columns.to(tl.int64)[None, :] * weight_strides[1]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_block = tl.load(a_rows + k[None, :], mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)  # [BM, BK]
        w = tl.load(weight_rows + k[:, None], mask=(k < K)[:, None] & (columns < N)[None, :], other=0.0)  # [BK, BN]
        acc = dot(a_block, w, acc, INPUT_PRECISION)
    y += layer * y_strides[0]
    x += layer * x_strides[0]
    if bias is not None:
        bias += layer * bias_strides[0]
    out += layer * M * N
    store_step(acc, bias, y, x, out, rows, columns, y_strides[1], x_strides[1], M, N, h, SAME)


def linear_axpy_reference(a: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, x: Tensor, h: float) -> Tensor:
    """What :func:`linear_axpy` does, in plain PyTorch."""
    linear = torch.stack([F.linear(a[j], weight[j], None if bias is None else bias[j]) for j in range(len(a))])
    return y + linear if h == 1 else x + h * ((y - x) + linear)


def default_config(d: int = 256, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """The configuration of a launch for which no tuned one is known; d is the width of `a`."""
    if dtype == torch.float32:
        return _config(64, 64, 32, 8, 2)
    return _config(64, 64, 64, 4, 4)


def configs(d: int = 256, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, int]]:
    """Candidates to tune over."""
    if dtype == torch.float32:
        return [_config(*c) for c in ((32, 32, 32, 4, 3), (32, 64, 32, 4, 3), (64, 64, 32, 8, 2), (128, 64, 16, 8, 2))]
    small = [(32, 64, 64, 4, 4), (32, 64, 128, 4, 3), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3)]
    large = [(64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 64, 8, 4), (64, 256, 64, 8, 4)]
    return [_config(*c) for c in small + large]


def _config(m, n, k, warps, stages):
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "num_warps": warps, "num_stages": stages}


def launch_of(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    x: Tensor,
    h: float,
    out: Tensor,
    config: dict[str, int],
) -> Launch:
    """The launch that fills `out` [J, M, N]; y is None where it is x, which is then read once."""
    (layers, m, k), n = a.shape, weight.shape[1]
    same = y is None
    y = x if y is None else y
    return Launch(
        linear_axpy_fwd_kernel,
        (layers * triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]),),
        (a, weight, bias, y, x, out, *strides_of(a, weight, bias, y, x), m, n, k, float(h)),
        {"SAME": same, "INPUT_PRECISION": input_precision(), **config},
    )


def _check(a, weight, bias, y, x):
    if a.ndim != 3 or weight.ndim != 3:
        raise ValueError(f"a has {a.ndim} dimensions and weight {weight.ndim}, expected [J, M, K] and [J, N, K]")
    (layers, m, k), n = a.shape, weight.shape[1]
    check_dense("a", a)
    check("weight", weight, (layers, n, k), like=a)
    check("bias", bias, (layers, n), like=a)
    check("y", y, (layers, m, n), like=a)
    check("x", x, (layers, m, n), like=a)


@library.custom_op("mlpint::linear_axpy", mutates_args=())
def linear_axpy(a: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, x: Tensor, h: float) -> Tensor:
    """x + h ((y - x) + a @ weight^T + bias) of J independent layers.

    With y = x it is x + h (a @ weight^T + bias). Training keeps nothing of it: its backward needs `a` alone.

    Args:
        a: [J, M, K], float32, bfloat16 or float16. Like all tensors, any strides but 1 in the last dimension.
        weight: [J, N, K], as torch.nn.Linear has it. Strided views of stacked parameters are read in place.
        bias: [J, N], or None.
        y: [J, M, N], the state within the step; pass x itself where there is none.
        x: [J, M, N], the state before the step.
        h: step size.

    Returns:
        [J, M, N] of x's dtype. The product and the step are in float32, rounded once.

    Raises:
        ValueError: a shape, dtype or stride that does not fit.
    """
    _check(a, weight, bias, y, x)
    layers, m, k = a.shape
    out = a.new_empty(layers, m, weight.shape[1])
    if out.numel():
        config = dispatch.config("linear_axpy", k, m, layers, a.dtype, a.device) or default_config(k, a.dtype)
        same = y.data_ptr() == x.data_ptr() and y.stride() == x.stride()
        launch_of(a, weight, bias, None if same else y, x, h, out, config).run()
    return out


@linear_axpy.register_fake
def _(a, weight, bias, y, x, h):
    return a.new_empty(a.shape[0], a.shape[1], weight.shape[1])


def aot_launches(candidates: bool = False):
    """The launches that `mlpint.kernels.aot` compiles: the projection and the way down."""
    for dtype in (torch.bfloat16, torch.float32):
        layers, m, n = 2, 512, 256
        for k in (n, 4 * n):
            a, x, y = (torch.empty(layers, m, size, dtype=dtype, device="meta") for size in (k, n, n))
            weight = torch.empty(layers, n, k, dtype=dtype, device="meta")
            bias = torch.empty(layers, n, dtype=dtype, device="meta")
            for config in configs(k, dtype) if candidates else [default_config(k, dtype)]:
                yield launch_of(a, weight, bias, None if k == n else y, x, 0.5, y, config)
                yield launch_of(a, weight, None, y, x, 0.5, y, config)
