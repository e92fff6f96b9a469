"""The pre-LN step and its hand-written backward, for J independent blocks at once.

    y = x + drop(O attention(QKV LN1 x)),  out = x + h ((y - x) + drop(W2 gelu(W1 LN2 y)))

x, y, out are [J, M, D], M = batch x sequence. The backward comes in two halves: :func:`input_vjp` gives the gradient
for x and what the other half will need; :func:`weight_vjp` writes the parameters' gradients, now or later.
"""

from __future__ import annotations

import torch

from . import ops
from .dropout import FFN, PROJECTION
from .settings import Weights
from .step_context import StepContext

Tensors = tuple[torch.Tensor, ...]


def forward(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One step, with nothing saved."""
    qkv = ops.ln_linear(x, w.ln1_weight, w.ln1_bias, w.qkv_weight, w.qkv_bias, context.eps, "none")
    y = context.onto_stream(context.attention(qkv), w.proj_weight, w.proj_bias, x, x, 1, PROJECTION)
    if not context.drops:
        return ops.mlp(y, x, w, context.h, context.eps, context.activation)
    a = ops.ln_linear(y, w.ln2_weight, w.ln2_bias, w.up_weight, w.up_bias, context.eps, context.activation)
    return context.onto_stream(a, w.down_weight, w.down_bias, y, x, context.h, FFN)


def forward_train(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """One step, and what its backward needs; every tensor of it has the leading dimension J."""
    qkv, mean1, rstd1, _ = ops.ln_linear_train(
        x, w.ln1_weight, w.ln1_bias, w.qkv_weight, w.qkv_bias, context.eps, "none"
    )
    o, attended = context.attention_train(qkv)
    y = context.onto_stream(o, w.proj_weight, w.proj_bias, x, x, 1, PROJECTION)
    a, mean2, rstd2, pre = ops.ln_linear_train(
        y, w.ln2_weight, w.ln2_bias, w.up_weight, w.up_bias, context.eps, context.activation
    )
    out = context.onto_stream(a, w.down_weight, w.down_bias, y, x, context.h, FFN)
    return out, (x, mean1, rstd1, qkv, o, attended, y, mean2, rstd2, pre, a)


def input_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, grad: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    """The gradient for x, and the gradients inside the step that :func:`weight_vjp` takes."""
    x, mean1, rstd1, qkv, o, attended, y, mean2, rstd2, pre, _ = saved
    h = context.h
    scaled = grad if h == 1 else grad * h
    d_down = context.dropped(scaled, FFN).to(w.down_weight.dtype)
    d_pre = ops.activation_backward(ops.linear_backward(d_down, w.down_weight), pre, context.activation)
    d_n2 = ops.linear_backward(d_pre, w.up_weight)
    dy, sums2 = ops.norm_backward_add(d_n2, y, mean2, rstd2, w.ln2_weight, scaled)
    d_proj = context.dropped(dy, PROJECTION).to(w.proj_weight.dtype)
    d_qkv = context.attention_backward(ops.linear_backward(d_proj, w.proj_weight), qkv, o, attended)
    d_n1 = ops.linear_backward(d_qkv, w.qkv_weight)
    dx, sums1 = ops.norm_backward_add(d_n1, x, mean1, rstd1, w.ln1_weight, dy)
    if h != 1:
        dx += grad - scaled
    return dx, (d_down, d_pre, d_n2, sums2, d_proj, d_qkv, d_n1, sums1)


def weight_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, inner: Tensors, into: Weights[torch.Tensor | None]
) -> None:
    """Writes the parameters' gradients into [J, ...] tensors of any strides; None stands for one not wanted."""
    x, mean1, rstd1, _, o, _, y, mean2, rstd2, _, a = saved
    d_down, d_pre, d_n2, sums2, d_proj, d_qkv, d_n1, sums1 = inner
    ops.linear_weight_grads(d_down, a, into.down_weight, into.down_bias)
    ops.norm_linear_weight_grads(
        d_pre, d_n2, sums2, y, mean2, rstd2, w.ln2_weight, w.ln2_bias,
        (into.up_weight, into.up_bias, into.ln2_weight, into.ln2_bias),
    )  # fmt: skip
    ops.linear_weight_grads(d_proj, o, into.proj_weight, into.proj_bias)
    ops.norm_linear_weight_grads(
        d_qkv, d_n1, sums1, x, mean1, rstd1, w.ln1_weight, w.ln1_bias,
        (into.qkv_weight, into.qkv_bias, into.ln1_weight, into.ln1_bias),
    )  # fmt: skip
