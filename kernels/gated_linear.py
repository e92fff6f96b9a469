"""Norm and the way up of a gated feed-forward half in one kernel: act(n Wg^T + bg) (n Wu^T + bu), n the normed state.

`gated_linear` keeps nothing, and the inner width's two maps never reach memory; `gated_linear_train` keeps them.
J layers run in one launch. The norm is a LayerNorm, or an RMSNorm where it has no bias; see ln_linear.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from . import dispatch
from .common import (
    Launch,
    activate,
    check_activation,
    dot,
    input_precision,
    round_to,
    strides_of,
    tile_of,
    to_float,
)
from .ln_linear import (
    activation_reference,
    check_operands,
    empty_statistics,
    linear_reference,
    normalised,
    statistics_reference,
    store_statistics,
    stream_statistics,
    streamed,
)


@triton.jit
def gated_linear_fwd_kernel(
    x,  # [J, M, D]
    ln_weight,  # [J, D]
    ln_bias,  # [J, D], or None
    weight,  # [J, 2 F, D], the gate's rows first
    bias,  # [J, 2 F], or None
    y,  # [J, M, F], dense
    pre_activation,  # [J, M, 2 F], dense; None where TRAIN is false, like rstd_out
    mean_out,  # [J, M], float32, dense; None where TRAIN is false or RMS is true
    rstd_out,  # [J, M], float32, dense
    x_strides,  # (J, M)
    ln_weight_strides,  # (J,)
    ln_bias_strides,  # (J,)
    weight_strides,  # (J, 2 F)
    bias_strides,  # (J,)
    M,
    F,
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
    layer, pid_m, pid_n = tile_of(tl.program_id(0), M, F, BLOCK_M, BLOCK_N, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < F
    x_rows = x + layer * x_strides[0] + rows.to(tl.int64)[:, None] * x_strides[1]
    weight += layer * weight_strides[0]
    gate_rows = weight + columns.to(tl.int64)[None, :] * weight_strides[1]
    up_rows = weight + (columns + F).to(tl.int64)[None, :] * weight_strides[1]
    mean, rstd = stream_statistics(x_rows, row_mask, D, eps, RMS, BLOCK_M, BLOCK_K)
    if TRAIN:
        store_statistics(mean, rstd, mean_out, rstd_out, layer, rows, M, pid_n)

    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < D
        a = to_float(tl.load(x_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0))  # [BM, BK]
        a = normalised(a, mean, rstd, ln_weight, ln_bias, ln_weight_strides, ln_bias_strides, layer, k, D)
        a = round_to(a, x.dtype.element_ty)
        both = k_mask[:, None] & column_mask[None, :]
        gate = dot(a, tl.load(gate_rows + k[:, None], mask=both, other=0.0), gate, INPUT_PRECISION)
        up = dot(a, tl.load(up_rows + k[:, None], mask=both, other=0.0), up, INPUT_PRECISION)
    if bias is not None:
        bias += layer * bias_strides[0] + columns
        gate += to_float(tl.load(bias, mask=column_mask, other=0.0))[None, :]
        up += to_float(tl.load(bias + F, mask=column_mask, other=0.0))[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    at = (layer * M + rows.to(tl.int64)[:, None]) * F
    if TRAIN:
        kept = pre_activation + 2 * at + columns[None, :]
        tl.store(kept, round_to(gate, y.dtype.element_ty), mask=mask)
        tl.store(kept + F, round_to(up, y.dtype.element_ty), mask=mask)
    tl.store(y + at + columns[None, :], round_to(activate(gate, ACTIVATION) * up, y.dtype.element_ty), mask=mask)


def gated_linear_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """What :func:`gated_linear` does, in plain PyTorch."""
    return _reference(x, ln_weight, ln_bias, weight, bias, eps, activation)[0]


def gated_linear_train_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`gated_linear_train` does, in plain PyTorch."""
    y, pre_activation = _reference(x, ln_weight, ln_bias, weight, bias, eps, activation)
    return y, *statistics_reference(x, eps, ln_bias is None), pre_activation


def _reference(x, ln_weight, ln_bias, weight, bias, eps, activation):
    check_activation(activation)
    both, _ = linear_reference(x, ln_weight, ln_bias, weight, bias, eps, "none")
    gate, up = both.chunk(2, -1)
    return activation_reference(gate, activation) * up, both


def default_config(d: int = 256, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """The configuration of a launch for which no tuned one is known."""
    return streamed(32, 64, 32, 8, 2) if dtype == torch.float32 else streamed(64, 64, 64, 8, 3)


def configs(d: int = 256, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, int]]:
    """Candidates to tune over: there are two accumulators, and two blocks of the weight in flight."""
    if dtype == torch.float32:
        return [streamed(*c) for c in ((32, 32, 32, 8, 2), (32, 64, 32, 8, 2))]
    return [streamed(*c) for c in ((32, 64, 64, 4, 3), (64, 64, 64, 8, 3), (64, 128, 64, 8, 3), (128, 64, 64, 8, 3))]


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
    """The launch that fills outputs = (y, mean, rstd, pre_activation); without the last two, it is forward-only."""
    (layers, m, d), f = x.shape, weight.shape[1] // 2
    y, mean, rstd, pre_activation = outputs
    return Launch(
        gated_linear_fwd_kernel,
        (layers * triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(f, config["BLOCK_N"]),),
        (
            *(x, ln_weight, ln_bias, weight, bias, y, pre_activation, mean, rstd),
            *(*strides_of(x, ln_weight, ln_bias, weight, bias), m, f, d, float(eps)),
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
    if x.ndim != 3 or weight.ndim != 3 or weight.shape[1] % 2:
        got = f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{got}: expected [J, M, D] and [J, 2 F, D]")
    check_operands(x, ln_weight, ln_bias, weight, bias, activation)


def _config_of(x: Tensor) -> dict[str, int]:
    layers, m, d = x.shape
    return dispatch.config("gated_linear", d, m, layers, x.dtype, x.device) or default_config(d, x.dtype)


@library.custom_op("mlpint::gated_linear", mutates_args=())
def gated_linear(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """activation(g) u, (g, u) = norm(x) @ weight^T + bias, of J independent layers, nothing kept for a backward pass.

    Args:
        x: [J, M, D], float32, bfloat16 or float16. Like all tensors, any strides but 1 in the last dimension.
        ln_weight, ln_bias: [J, D]; the bias None: an RMSNorm.
        weight: [J, 2 F, D], the gate's rows first. Strided views of stacked parameters are read in place.
        bias: [J, 2 F], or None.
        eps: added to the variance.
        activation: "silu", "gelu_tanh", "gelu" (exact) or "none".

    Returns:
        [J, M, F] of x's dtype. Statistics, products and activation are in float32.

    Raises:
        ValueError: a shape, dtype or stride that does not fit.
    """
    _check(x, ln_weight, ln_bias, weight, bias, activation)
    y = x.new_empty(x.shape[0], x.shape[1], weight.shape[1] // 2)
    if y.numel():
        outputs = (y, None, None, None)
        launch_of(x, ln_weight, ln_bias, weight, bias, eps, activation, outputs, _config_of(x)).run()
    return y


@gated_linear.register_fake
def _(x, ln_weight, ln_bias, weight, bias, eps=1e-5, activation="silu"):
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[1] // 2)


@library.custom_op("mlpint::gated_linear_train", mutates_args=())
def gated_linear_train(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`gated_linear` that keeps what a backward pass needs.

    Returns:
        y [J, M, F]; mean and 1/std of the rows, [J, M], float32 (the mean [J, 0] of an RMSNorm); (g, u) [J, M, 2 F].
    """
    _check(x, ln_weight, ln_bias, weight, bias, activation)
    y, mean, rstd, pre = outputs = _train_outputs(x, ln_bias, weight)
    if y.numel():
        filled = y, mean if mean.numel() else None, rstd, pre
        launch_of(x, ln_weight, ln_bias, weight, bias, eps, activation, filled, _config_of(x)).run()
    return outputs


@gated_linear_train.register_fake
def _(x, ln_weight, ln_bias, weight, bias, eps=1e-5, activation="silu"):
    return _train_outputs(x, ln_bias, weight)


def _train_outputs(x, ln_bias, weight):
    (layers, m, _), n = x.shape, weight.shape[1]
    return x.new_empty(layers, m, n // 2), *empty_statistics(x, ln_bias is None), x.new_empty(layers, m, n)


def aot_launches(candidates: bool = False):
    """The launches that `mlpint.kernels.aot` compiles: Llama's and one with all biases."""
    layers, m, d = 2, 512, 256
    for dtype in (torch.bfloat16, torch.float32):
        x, y, pre = (torch.empty(layers, m, size, dtype=dtype, device="meta") for size in (d, 4 * d, 8 * d))
        norm, bias = (torch.empty(layers, size, dtype=dtype, device="meta") for size in (d, 8 * d))
        weight, rstd = torch.empty(layers, 8 * d, d, dtype=dtype, device="meta"), torch.empty(layers, m, device="meta")
        for config in configs(d, dtype) if candidates else [default_config(d, dtype)]:
            yield launch_of(x, norm, None, weight, None, 1e-5, "silu", (y, None, rstd, pre), config)
            yield launch_of(x, norm, None, weight, None, 1e-5, "silu", (y, None, None, None), config)
            yield launch_of(x, norm, norm, weight, bias, 1e-5, "gelu_tanh", (y, rstd, rstd, pre), config)
