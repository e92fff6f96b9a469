"""LayerNorm or RMSNorm, linear map and activation in one kernel: QKV, and the FFN's way up with its GELU.

Without a bias the norm is an RMSNorm, whose mean counts as 0. `ln_linear` keeps nothing; `ln_linear_train` also returns
what a backward pass needs. J layers run in one launch.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from . import dispatch
from .common import (
    Launch,
    activate,
    check,
    check_activation,
    check_dense,
    dot,
    input_precision,
    round_to,
    strides_of,
    tile_of,
    to_float,
)

GELU_APPROXIMATION = {"gelu_tanh": "tanh", "gelu": "none"}  # torch's names
WIDEST_ROW = 256  # channels of a row that is held whole


@triton.jit
def row_statistics(block, columns, D, eps, RMS: tl.constexpr):
    """Mean and 1/std [BM] of whole rows, a block [BM, BK] with BK >= D and zeros beyond D; float32."""
    if RMS:
        mean = tl.zeros((block.shape[0],), tl.float32)
        centred = block
    else:
        mean = tl.sum(block, 1) / D
        centred = tl.where((columns < D)[None, :], block - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    return mean, rstd


@triton.jit
def stream_statistics(x, row_mask, D, eps, RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1/std [BM] of rows at pointers x [BM, 1], read in blocks of BLOCK_K columns.

    Blocks are merged by Chan, Golub and LeVeque's update: no cancellation where a row's mean is far from zero.
    """
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (columns < D)[None, :]
        block = to_float(tl.load(x + columns[None, :], mask=mask, other=0.0))  # [BM, BK]
        if RMS:
            squares += tl.sum(block * block, 1)
        else:
            count = tl.minimum(D - start, BLOCK_K).to(tl.float32)
            block_mean = tl.sum(block, 1) / count
            centred = tl.where((columns < D)[None, :], block - block_mean[:, None], 0.0)
            delta = block_mean - mean
            share = count / (start + count)
            mean += delta * share
            squares += tl.sum(centred * centred, 1) + delta * delta * (share * start)
    return mean, tl.rsqrt(squares / D + eps)


@triton.jit
def store_statistics(mean, rstd, mean_out, rstd_out, layer, rows, M, pid_n):
    """Store a layer's mean and 1/std [BM] to mean_out and rstd_out [J, M]; the programs of the first columns do.

    An RMSNorm has no mean: None.
    """
    first = pid_n == 0
    if mean_out is not None:
        tl.store(mean_out + layer * M + rows, mean, mask=(rows < M) & first)
    tl.store(rstd_out + layer * M + rows, rstd, mask=(rows < M) & first)


@triton.jit
def normalised(block, mean, rstd, ln_weight, ln_bias, weight_strides, bias_strides, layer, columns, D):
    """The norm of a block [BM, BK] with known statistics, by a layer's row of ln_weight and ln_bias, [J, D] or None."""
    scale = to_float(tl.load(ln_weight + layer * weight_strides[0] + columns, mask=columns < D, other=0.0))
    normal = (block - mean[:, None]) * rstd[:, None] * scale[None, :]
    if ln_bias is not None:
        normal += to_float(tl.load(ln_bias + layer * bias_strides[0] + columns, mask=columns < D, other=0.0))[None, :]
    return normal


@triton.jit
def store_activated(acc, bias, y, pre_activation, rows, columns, M, N, ACTIVATION: tl.constexpr, TRAIN: tl.constexpr):
    """Store an accumulator [BM, BN] with bias and activation; y and pre_activation point to one layer's [M, N]."""
    if bias is not None:
        acc += to_float(tl.load(bias + columns, mask=columns < N, other=0.0))[None, :]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    if TRAIN and ACTIVATION != "none":
        tl.store(pre_activation + at, round_to(acc, y.dtype.element_ty), mask=mask)
    tl.store(y + at, round_to(activate(acc, ACTIVATION), y.dtype.element_ty), mask=mask)


@triton.jit
def ln_linear_fwd_kernel(
    x,  # [J, M, D]
    ln_weight,  # [J, D]
    ln_bias,  # [J, D], or None
    weight,  # [J, N, D]
    bias,  # [J, N], or None
    y,  # [J, M, N], dense
    pre_activation,  # [J, M, N], dense; y itself where none is kept
    mean_out,  # [J, M], float32, dense; None where TRAIN is false, like rstd_out, or RMS is true
    rstd_out,  # [J, M], float32, dense
    x_strides,  # (J, M)
    ln_weight_strides,  # (J,)
    ln_bias_strides,  # (J,)
    weight_strides,  # (J, N)
    bias_strides,  # (J,)
    M,
    N,
    D,
    eps,
    ACTIVATION: tl.constexpr,
    RMS: tl.constexpr,
    TRAIN: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """For any D: rows are read twice, for their statistics and, normalised on the fly, for the product."""
    layer, pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    x_rows = x + layer * x_strides[0] + rows.to(tl.int64)[:, None] * x_strides[1]
    weight_rows = weight + layer * weight_strides[0] + columns.to(tl.int64)[None, :] * weight_strides[1]
    mean, rstd = stream_statistics(x_rows, row_mask, D, eps, RMS, BLOCK_M, BLOCK_K)
    if TRAIN:
        store_statistics(mean, rstd, mean_out, rstd_out, layer, rows, M, pid_n)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < D
        a = to_float(tl.load(x_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0))  # [BM, BK]
        a = normalised(a, mean, rstd, ln_weight, ln_bias, ln_weight_strides, ln_bias_strides, layer, k, D)
        w = tl.load(weight_rows + k[:, None], mask=k_mask[:, None] & (columns < N)[None, :], other=0.0)  # [BK, BN]
        acc = dot(round_to(a, x.dtype.element_ty), w, acc, INPUT_PRECISION)
    at = layer * M * N
    if bias is not None:
        bias += layer * bias_strides[0]
    store_activated(acc, bias, y + at, pre_activation + at, rows, columns, M, N, ACTIVATION, TRAIN)


@triton.jit
def ln_linear_rows_fwd_kernel(
    x,  # [J, M, D]
    ln_weight,  # [J, D]
    ln_bias,  # [J, D], or None
    weight,  # [J, N, D]
    bias,  # [J, N], or None
    y,  # [J, M, N], dense
    pre_activation,  # [J, M, N], dense; y itself where none is kept
    mean_out,  # [J, M], float32, dense; None where TRAIN is false, like rstd_out, or RMS is true
    rstd_out,  # [J, M], float32, dense
    x_strides,  # (J, M)
    ln_weight_strides,  # (J,)
    ln_bias_strides,  # (J,)
    weight_strides,  # (J, N)
    bias_strides,  # (J,)
    M,
    N,
    D,
    eps,
    ACTIVATION: tl.constexpr,
    RMS: tl.constexpr,
    TRAIN: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """For narrow D, at most BLOCK_K: rows are read and normalised once, and serve TILES tiles of columns."""
    layer, pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N * TILES, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    k = tl.arange(0, BLOCK_K)
    k_mask = k < D
    x_rows = x + layer * x_strides[0] + rows.to(tl.int64)[:, None] * x_strides[1]
    row = to_float(tl.load(x_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0))  # [BM, BK]
    mean, rstd = row_statistics(row, k, D, eps, RMS)
    if TRAIN:
        store_statistics(mean, rstd, mean_out, rstd_out, layer, rows, M, pid_n)
    a = normalised(row, mean, rstd, ln_weight, ln_bias, ln_weight_strides, ln_bias_strides, layer, k, D)
    a = round_to(a, x.dtype.element_ty)

    at = layer * M * N
    if bias is not None:
        bias += layer * bias_strides[0]
    for tile in range(0, TILES):
        columns = (pid_n * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_rows = weight + layer * weight_strides[0] + columns.to(tl.int64)[None, :] * weight_strides[1]
        w = tl.load(weight_rows + k[:, None], mask=k_mask[:, None] & (columns < N)[None, :], other=0.0)  # [BK, BN]
        acc = dot(a, w, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), INPUT_PRECISION)
        store_activated(acc, bias, y + at, pre_activation + at, rows, columns, M, N, ACTIVATION, TRAIN)


def ln_linear_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """What :func:`ln_linear` does, in plain PyTorch."""
    return linear_reference(x, ln_weight, ln_bias, weight, bias, eps, activation)[0]


def ln_linear_train_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`ln_linear_train` does, in plain PyTorch."""
    y, pre_activation = linear_reference(x, ln_weight, ln_bias, weight, bias, eps, activation)
    return y, *statistics_reference(x, eps, ln_bias is None), x.new_empty(0) if activation == "none" else pre_activation


def statistics_reference(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Mean ([J, 0] of an RMSNorm) and 1/std of rows, in single precision at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    if rms:
        return wide.new_empty(len(x), 0), torch.rsqrt(wide.square().mean(-1) + eps)
    variance, mean = torch.var_mean(wide, -1, correction=0)
    return mean, torch.rsqrt(variance + eps)


def norm_reference(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, eps: float) -> Tensor:
    """The norm of one layer, in plain PyTorch."""
    if ln_bias is None:
        return F.rms_norm(x, x.shape[-1:], ln_weight, eps)
    return F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)


def activation_reference(x: Tensor, activation: str) -> Tensor:
    """An activation by its name, in plain PyTorch."""
    if activation in ("silu", "relu"):
        return F.silu(x) if activation == "silu" else F.relu(x)
    return x if activation == "none" else F.gelu(x, approximate=GELU_APPROXIMATION[activation])


def of_layer(tensor: Tensor | None, j: int) -> Tensor | None:
    """That of layer j of what there may not be."""
    return None if tensor is None else tensor[j]


def linear_reference(x, ln_weight, ln_bias, weight, bias, eps, activation):
    """(activation of a linear map behind a norm, the linear map), in plain PyTorch."""
    check_activation(activation)
    normal = [norm_reference(x[j], ln_weight[j], of_layer(ln_bias, j), eps) for j in range(len(x))]
    linear = torch.stack([F.linear(normal[j], weight[j], of_layer(bias, j)) for j in range(len(x))])
    return activation_reference(linear, activation), linear


def default_config(d: int = 256, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """The configuration of a launch for which no tuned one is known."""
    if dtype == torch.float32:
        return streamed(64, 64, 32, 8, 2)
    return _rows(64, 64, 2, 4, 2) if d <= WIDEST_ROW else streamed(64, 128, 64, 4, 3)


def configs(d: int = 256, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, int]]:
    """Candidates to tune over. Those with TILES hold whole rows, for that many tiles of columns."""
    if dtype == torch.float32:
        exact = [(32, 32, 32, 4, 3), (32, 64, 32, 8, 3), (64, 64, 32, 8, 2), (128, 64, 16, 8, 2)]
        return [streamed(*c) for c in exact]
    blocks = [(32, 64, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3)]
    if d > WIDEST_ROW:
        return [streamed(*c) for c in (*blocks, (64, 256, 64, 8, 3))]
    rows = [(32, 64, 2, 4, 2), (64, 64, 1, 4, 1), (64, 64, 2, 4, 2), (64, 64, 4, 4, 2)]
    rows += [(64, 128, 4, 8, 2), (128, 64, 4, 8, 2)]
    return [_rows(*c) for c in rows] + [streamed(*c) for c in blocks]


def streamed(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    """A configuration that reads rows in blocks of k columns."""
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "num_warps": warps, "num_stages": stages}


def _rows(m, n, tiles, warps, stages):
    return {"BLOCK_M": m, "BLOCK_N": n, "TILES": tiles, "GROUP_M": 8, "num_warps": warps, "num_stages": stages}


def launch_of(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: str,
    outputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    config: dict[str, int],
) -> Launch:
    """The launch that fills outputs = (y, mean, rstd, pre_activation); without the last three, it is forward-only.

    The mean is None, too, of an RMSNorm.
    """
    (layers, m, d), n = x.shape, weight.shape[1]
    if "TILES" in config and d > WIDEST_ROW:  # tuned for a narrower network
        config = default_config(d, x.dtype)
    whole_rows = "TILES" in config
    if whole_rows:
        config = config | {"BLOCK_K": max(16, triton.next_power_of_2(d))}
    y, mean, rstd, pre_activation = outputs
    if pre_activation is None or activation == "none":
        pre_activation = y
    return Launch(
        ln_linear_rows_fwd_kernel if whole_rows else ln_linear_fwd_kernel,
        (layers * triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"] * config.get("TILES", 1)),),
        (
            *(x, ln_weight, ln_bias, weight, bias, y, pre_activation, mean, rstd),
            *(*strides_of(x, ln_weight, ln_bias, weight, bias), m, n, d, float(eps)),
        ),
        {
            "ACTIVATION": activation,
            "RMS": ln_bias is None,
            "TRAIN": rstd is not None,
            "INPUT_PRECISION": input_precision(),
            **config,
        },
    )


def _check(x, ln_weight, ln_bias, weight, bias, activation):
    if x.ndim != 3 or weight.ndim != 3:
        raise ValueError(f"x has {x.ndim} dimensions and weight {weight.ndim}, expected [J, M, D] and [J, N, D]")
    check_operands(x, ln_weight, ln_bias, weight, bias, activation)


def check_operands(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> None:
    """Raise ValueError unless a norm, a linear map [J, N, D] behind it and an activation go with x [J, M, D]."""
    (layers, _, d), n = x.shape, weight.shape[1]
    check_activation(activation)
    check_dense("x", x)
    check("ln_weight", ln_weight, (layers, d), like=x)
    check("ln_bias", ln_bias, (layers, d), like=x)
    check("weight", weight, (layers, n, d), like=x)
    check("bias", bias, (layers, n), like=x)


def _config(x: Tensor) -> dict[str, int]:
    layers, m, d = x.shape
    return dispatch.config("ln_linear", d, m, layers, x.dtype, x.device) or default_config(d, x.dtype)


@library.custom_op("mlpint::ln_linear", mutates_args=())
def ln_linear(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """activation(LayerNorm(x) @ weight^T + bias) of J independent layers, nothing kept for a backward pass.

    Args:
        x: [J, M, D], float32, bfloat16 or float16. Like all tensors, any strides but 1 in the last dimension.
        ln_weight, ln_bias: [J, D]; the bias None: an RMSNorm.
        weight: [J, N, D], as torch.nn.Linear has it. Strided views of stacked parameters are read in place.
        bias: [J, N], or None.
        eps: added to the variance.
        activation: "none", "gelu_tanh", "gelu" (exact), "relu" or "silu".

    Returns:
        [J, M, N] of x's dtype. Statistics, products and activation are in float32.

    Raises:
        ValueError: a shape, dtype or stride that does not fit.
    """
    _check(x, ln_weight, ln_bias, weight, bias, activation)
    y = x.new_empty(x.shape[0], x.shape[1], weight.shape[1])
    if y.numel():
        outputs = (y, None, None, None)
        launch_of(x, ln_weight, ln_bias, weight, bias, eps, activation, outputs, _config(x)).run()
    return y


@ln_linear.register_fake
def _(x, ln_weight, ln_bias, weight, bias, eps=1e-5, activation="none"):
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[1])


@library.custom_op("mlpint::ln_linear_train", mutates_args=())
def ln_linear_train(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`ln_linear` that keeps what a backward pass needs.

    Returns:
        y [J, M, N]; mean and 1/std of the rows, [J, M], float32 (the mean [J, 0] of an RMSNorm); the activation's
        argument [J, M, N] of x's dtype, empty for activation "none", where it is y.
    """
    _check(x, ln_weight, ln_bias, weight, bias, activation)
    y, mean, rstd, pre = outputs = _train_outputs(x, ln_bias, weight, activation)
    if y.numel():
        filled = y, mean if mean.numel() else None, rstd, pre
        launch_of(x, ln_weight, ln_bias, weight, bias, eps, activation, filled, _config(x)).run()
    return outputs


@ln_linear_train.register_fake
def _(x, ln_weight, ln_bias, weight, bias, eps=1e-5, activation="none"):
    return _train_outputs(x, ln_bias, weight, activation)


def _train_outputs(x, ln_bias, weight, activation):
    (layers, m, _), n = x.shape, weight.shape[1]
    y = x.new_empty(layers, m, n)
    return y, *empty_statistics(x, ln_bias is None), x.new_empty(0) if activation == "none" else torch.empty_like(y)


def empty_statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """Memory for mean ([J, 0] of an RMSNorm) and 1/std of rows, float32."""
    layers, m, _ = x.shape
    return x.new_empty(layers, 0 if rms else m, dtype=torch.float32), x.new_empty(layers, m, dtype=torch.float32)


def aot_launches(candidates: bool = False):
    """The launches that `mlpint.kernels.aot` compiles: both families, both kernels."""
    # float32 streams every width alike
    for dtype, widths in ((torch.bfloat16, (256, 1024)), (torch.float32, (1024,))):
        for d in widths:
            layers, m, n = 2, 512, 4 * d
            x, y = (torch.empty(layers, m, size, dtype=dtype, device="meta") for size in (d, n))
            norm, bias = (torch.empty(layers, size, dtype=dtype, device="meta") for size in (d, n))
            weight = torch.empty(layers, n, d, dtype=dtype, device="meta")
            mean = torch.empty(layers, m, device="meta")
            for config in configs(d, dtype) if candidates else [default_config(d, dtype)]:
                for outputs in ((y, mean, mean, y), (y, None, None, None)):
                    yield launch_of(x, norm, norm, weight, bias, 1e-5, "gelu_tanh", outputs, config)
                for rstd in (mean, None):
                    yield launch_of(x, norm, None, weight, None, 1e-5, "none", (y, None, rstd, y), config)
