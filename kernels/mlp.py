"""The whole feed-forward half of a step in one kernel, for narrow networks: LayerNorm, W1, GELU, W2, residual step.

A program owns BLOCK_M rows. It normalises them once and walks over the hidden channels in blocks: up, GELU, and down
into an accumulator over all D output channels. The hidden activations never reach memory. Forward only.
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
    to_float,
)
from .ln_linear import activation_reference, normalised, row_statistics

WIDEST = 256  # channels: a row, and the accumulator of its result, are held whole
MOST_A_WARP = 2048  # numbers of the accumulator; with more, registers spill


@triton.jit
def mlp_fwd_kernel(
    y,  # [J, M, D]
    x,  # [J, M, D]
    ln_weight,  # [J, D]
    ln_bias,  # [J, D]
    w1,  # [J, H, D]
    b1,  # [J, H]
    w2,  # [J, D, H]
    b2,  # [J, D]
    out,  # [J, M, D], dense
    y_strides,  # (J, M)
    x_strides,
    ln_weight_strides,  # (J,)
    ln_bias_strides,  # (J,)
    w1_strides,  # (J, H)
    b1_strides,  # (J,)
    w2_strides,  # (J, D)
    b2_strides,  # (J,)
    M,
    D,
    H,
    h,
    eps,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= D
    BLOCK_H: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    layer = (tl.program_id(0) // tiles_m).to(tl.int64)
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < D
    rows64 = rows.to(tl.int64)[:, None]
    mask = (rows < M)[:, None] & d_mask[None, :]
    y_at = y + layer * y_strides[0] + rows64 * y_strides[1] + d[None, :]
    row = to_float(tl.load(y_at, mask=mask, other=0.0))  # [BM, BD]
    mean, rstd = row_statistics(row, d, D, eps, False)
    a = normalised(row, mean, rstd, ln_weight, ln_bias, ln_weight_strides, ln_bias_strides, layer, d, D)
    a = round_to(a, y.dtype.element_ty)

    w1_at = w1 + layer * w1_strides[0] + d[:, None]
    w2_at = w2 + layer * w2_strides[0] + d.to(tl.int64)[None, :] * w2_strides[1]
    # y is at hand: the sum begins with it, and the end needs registers for x alone
    acc = row + to_float(tl.load(b2 + layer * b2_strides[0] + d, mask=d_mask, other=0.0))[None, :]
    for start in range(0, H, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H)
        k_mask = k < H
        both = d_mask[:, None] & k_mask[None, :]
        up = tl.load(w1_at + k.to(tl.int64)[None, :] * w1_strides[1], mask=both, other=0.0)  # [BD, BH]
        hidden = dot(a, up, tl.zeros((BLOCK_M, BLOCK_H), tl.float32), INPUT_PRECISION)
        hidden += to_float(tl.load(b1 + layer * b1_strides[0] + k, mask=k_mask, other=0.0))[None, :]
        hidden = round_to(activate(hidden, ACTIVATION), y.dtype.element_ty)  # [BM, BH], 0 beyond H
        down = tl.load(w2_at + k[:, None], mask=k_mask[:, None] & d_mask[None, :], other=0.0)  # [BH, BD]
        acc = dot(hidden, down, acc, INPUT_PRECISION)
    x_at = x + layer * x_strides[0] + rows64 * x_strides[1] + d[None, :]
    old = to_float(tl.load(x_at, mask=mask, other=0.0))
    new = (1.0 - h) * old + h * acc
    tl.store(out + layer * M * D + rows64 * D + d[None, :], round_to(new, out.dtype.element_ty), mask=mask)


def mlp_reference(
    y: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    h: float,
    eps: float = 1e-5,
    activation: str = "gelu_tanh",
) -> Tensor:
    """What :func:`mlp` does, in plain PyTorch."""
    check_activation(activation)
    out = []
    for j in range(len(y)):
        normal = F.layer_norm(y[j], y.shape[-1:], ln_weight[j], ln_bias[j], eps)
        hidden = activation_reference(F.linear(normal, w1[j], b1[j]), activation)
        out.append(F.linear(hidden, w2[j], b2[j]))
    linear = torch.stack(out)
    return y + linear if h == 1 else x + h * ((y - x) + linear)


def default_config(d: int = 256, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """The configuration of a launch for which no tuned one is known."""
    return _config(16, 32, 8, 2) if dtype == torch.float32 else _config(64, 32, 8, 3)


def configs(d: int = 256, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, int]]:
    """Candidates to tune over."""
    if dtype == torch.float32:
        return [_config(*c) for c in ((16, 16, 8, 2), (16, 32, 8, 2))]
    if d <= WIDEST // 2:
        return [_config(*c) for c in ((16, 64, 4, 3), (32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3))]
    return [_config(*c) for c in ((16, 64, 4, 2), (32, 32, 4, 3), (32, 64, 4, 2), (64, 32, 8, 3), (64, 64, 8, 2))]


def _config(m, hidden, warps, stages):
    return {"BLOCK_M": m, "BLOCK_H": hidden, "num_warps": warps, "num_stages": stages}


def launch_of(
    y: Tensor,
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    h: float,
    eps: float,
    activation: str,
    out: Tensor,
    config: dict[str, int],
) -> Launch:
    """The launch that fills `out` [J, M, D]; norm, up and down are pairs of weight and bias."""
    (layers, m, d), hidden = y.shape, up[0].shape[1]
    block_d = max(16, triton.next_power_of_2(d))
    if config["BLOCK_M"] * block_d > MOST_A_WARP * config["num_warps"]:  # tuned for a narrower network
        config = default_config(d, y.dtype)
    return Launch(
        mlp_fwd_kernel,
        (layers * triton.cdiv(m, config["BLOCK_M"]),),
        (
            *(y, x, *norm, *up, *down, out, *strides_of(y, x, *norm, *up, *down)),
            *(m, d, hidden, float(h), float(eps)),
        ),
        {
            "ACTIVATION": activation,
            "INPUT_PRECISION": input_precision(),
            "BLOCK_D": block_d,
            **config,
        },
    )


def _check(y, x, ln_weight, ln_bias, w1, b1, w2, b2, activation):
    if y.ndim != 3 or w1.ndim != 3:
        raise ValueError(f"y has {y.ndim} dimensions and w1 {w1.ndim}, expected [J, M, D] and [J, H, D]")
    (layers, m, d), hidden = y.shape, w1.shape[1]
    if d > WIDEST:
        raise ValueError(f"mlp holds rows of at most {WIDEST} channels and y has {d}: use ln_linear and linear_axpy")
    check_activation(activation)
    check_dense("y", y)
    check("x", x, (layers, m, d), like=y)
    check("ln_weight", ln_weight, (layers, d), like=y)
    check("ln_bias", ln_bias, (layers, d), like=y)
    check("w1", w1, (layers, hidden, d), like=y)
    check("b1", b1, (layers, hidden), like=y)
    check("w2", w2, (layers, d, hidden), like=y)
    check("b2", b2, (layers, d), like=y)


@library.custom_op("mlpint::mlp", mutates_args=())
def mlp(
    y: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    h: float,
    eps: float = 1e-5,
    activation: str = "gelu_tanh",
) -> Tensor:
    """x + h ((y - x) + W2 gelu(W1 LayerNorm(y) + b1) + b2) of J independent layers, nothing kept for a backward pass.

    Args:
        y: [J, M, D], D <= 256, the state after attention: float32, bfloat16 or float16. Like all tensors, any strides
            but 1 in the last dimension.
        x: [J, M, D], the state before the step.
        ln_weight, ln_bias: [J, D].
        w1, b1: [J, H, D] and [J, H], as torch.nn.Linear has them. Strided views of stacked parameters are read
            in place.
        w2, b2: [J, D, H] and [J, D].
        h: step size.
        eps: added to the variance.
        activation: "none", "gelu_tanh", "gelu" (exact), "relu" or "silu".

    Returns:
        [J, M, D] of y's dtype.

    Raises:
        ValueError: a shape, dtype or stride that does not fit, or D > 256.
    """
    _check(y, x, ln_weight, ln_bias, w1, b1, w2, b2, activation)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    if out.numel():
        layers, m, d = y.shape
        config = dispatch.config("mlp", d, m, layers, y.dtype, y.device) or default_config(d, y.dtype)
        launch_of(y, x, (ln_weight, ln_bias), (w1, b1), (w2, b2), h, eps, activation, out, config).run()
    return out


@mlp.register_fake
def _(y, x, ln_weight, ln_bias, w1, b1, w2, b2, h, eps=1e-5, activation="gelu_tanh"):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def aot_launches(candidates: bool = False):
    """The launches that `mlpint.kernels.aot` compiles."""
    for dtype in (torch.bfloat16, torch.float32):
        for d in (128, WIDEST) if candidates else (WIDEST,):
            for config in configs(d, dtype) if candidates else [default_config(d, dtype)]:
                yield _on_meta(d, dtype, config)


def _on_meta(d, dtype, config):
    def meta(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    layers, m, hidden = 2, 512, 4 * d
    y, bias = meta(layers, m, d), meta(layers, d)
    up, down = (meta(layers, hidden, d), meta(layers, hidden)), (meta(layers, d, hidden), bias)
    return launch_of(y, y, (bias, bias), up, down, 0.5, 1e-5, "gelu_tanh", y, config)
