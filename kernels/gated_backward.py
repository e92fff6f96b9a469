"""Backward of a gated activation y = act(g) u in one pass: of dy and (g, u) the gradients (dy u act'(g), dy act(g))."""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from . import dispatch
from .common import Launch, activate_and_slope, check_activation, round_to, to_float
from .ln_linear import activation_reference


@triton.jit
def gated_backward_kernel(
    dy,  # [N, F], dense
    pre,  # [N, 2 F], dense: g, u
    d_pre,  # [N, 2 F], dense
    N,
    F,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    mask = (rows < N) & (columns < F)
    at = 2 * rows * F + columns
    grad = to_float(tl.load(dy + rows * F + columns, mask=mask, other=0.0))  # [BN, BF]
    gate = to_float(tl.load(pre + at, mask=mask, other=0.0))
    up = to_float(tl.load(pre + at + F, mask=mask, other=0.0))
    value, slope = activate_and_slope(gate, ACTIVATION)
    tl.store(d_pre + at, round_to(grad * up * slope, d_pre.dtype.element_ty), mask=mask)
    tl.store(d_pre + at + F, round_to(grad * value, d_pre.dtype.element_ty), mask=mask)


def gated_backward_reference(dy: Tensor, pre: Tensor, activation: str = "silu") -> Tensor:
    """What :func:`gated_backward` does, by autograd."""
    check_activation(activation)
    with torch.enable_grad():
        leaf = pre.detach().requires_grad_()
        gate, up = leaf.chunk(2, -1)
        y = activation_reference(gate, activation) * up
    return torch.autograd.grad(y, leaf, dy)[0]


def default_config(f: int = 1024) -> dict[str, int]:
    """The configuration of a launch for which no tuned one is known."""
    return _config(4, 256, 4)


def configs(f: int = 1024) -> list[dict[str, int]]:
    """Candidates to tune over."""
    return [_config(*c) for c in ((1, 1024, 4), (2, 512, 4), (4, 256, 4), (8, 256, 8))]


def _config(n, f, warps):
    return {"BLOCK_N": n, "BLOCK_F": f, "num_warps": warps}


def launch_of(dy: Tensor, pre: Tensor, activation: str, d_pre: Tensor, config: dict[str, int]) -> Launch:
    """The launch that fills d_pre."""
    f = dy.shape[-1]
    n = dy.numel() // f
    grid = (triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(f, config["BLOCK_F"]))
    return Launch(gated_backward_kernel, grid, (dy, pre, d_pre, n, f), {"ACTIVATION": activation, **config})


@library.custom_op("mlpint::gated_backward", mutates_args=())
def gated_backward(dy: Tensor, pre: Tensor, activation: str = "silu") -> Tensor:
    """The gradient for (g, u) of J layers' act(g) u.

    Args:
        dy: gradient of the product, [J, M, F], contiguous; float32, bfloat16 or float16.
        pre: (g, u), [J, M, 2 F], contiguous, of the same dtype.
        activation: "silu", "gelu_tanh", "gelu" (exact) or "relu".

    Returns:
        [J, M, 2 F] of that dtype, computed in float32.

    Raises:
        ValueError: a shape, dtype or layout that does not fit.
    """
    check_activation(activation)
    if activation == "none":
        raise ValueError("activation is 'none': this is for gates")
    if dy.dim() != 3 or tuple(pre.shape) != (*dy.shape[:2], 2 * dy.shape[2]) or pre.dtype != dy.dtype:
        got = f"dy is {dy.dtype} {tuple(dy.shape)} and pre {pre.dtype} {tuple(pre.shape)}"
        raise ValueError(f"{got}: expected [J, M, F] and [J, M, 2 F] of one dtype")
    if not (dy.is_contiguous() and pre.is_contiguous()):
        raise ValueError("dy and pre must be contiguous")
    d_pre = torch.empty_like(pre)
    if dy.numel():
        j, m, f = dy.shape
        config = dispatch.config("gated_backward", f, m, j, dy.dtype, dy.device) or default_config(f)
        launch_of(dy, pre, activation, d_pre, config).run()
    return d_pre


@gated_backward.register_fake
def _(dy, pre, activation="silu"):
    return torch.empty_like(pre)


def aot_launches(candidates: bool = False):
    """The launches that `mlpint.kernels.aot` compiles."""
    for dtype in (torch.bfloat16, torch.float32):
        dy, pre = (torch.empty(2, 512, f, dtype=dtype, device="meta") for f in (1024, 2048))
        for config in configs() if candidates else [default_config()]:
            for activation in ("silu", "gelu_tanh", "gelu"):
                yield launch_of(dy, pre, activation, pre, config)
