"""The post-LN step (BERT, and the transformer of 2017) and its hand-written backward, for J independent blocks at once.

    y = LN1(x + drop(O attention(QKV x))),  z = LN2(y + drop(W2 gelu(W1 y))),  out = x + h (z - x)

Shapes and the two halves of the backward are those of pre_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import ops
from .dropout import FFN, PROJECTION
from .settings import Weights
from .step_context import StepContext

Tensors = tuple[torch.Tensor, ...]
Attend = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def forward(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One step, with nothing saved."""
    return forward_train(context, w, x, attend=lambda qkv: (context.attention(qkv), qkv))[0]


def forward_train(
    context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor, attend: Attend | None = None
) -> tuple[torch.Tensor, Tensors]:
    """One step, and what its backward needs; every tensor of it has the leading dimension J."""
    qkv = ops.linear(x, w.qkv_weight, w.qkv_bias)
    o, attended = (attend or context.attention_train)(qkv)
    s = context.onto_stream(o, w.proj_weight, w.proj_bias, x, x, 1, PROJECTION)
    y, mean1, rstd1 = ops.norm(s, w.ln1_weight, w.ln1_bias, context.eps)
    pre = ops.linear(y, w.up_weight, w.up_bias)
    a = ops.activate(pre, context.activation)
    t = context.onto_stream(a, w.down_weight, w.down_bias, y, y, 1, FFN)
    z, mean2, rstd2 = ops.norm(t, w.ln2_weight, w.ln2_bias, context.eps)
    out = z if context.h == 1 else torch.lerp(x, z, context.h)
    return out, (x, qkv, o, attended, s, mean1, rstd1, y, pre, a, t, mean2, rstd2)


def input_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, grad: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    """The gradient for x, and the gradients inside the step that :func:`weight_vjp` takes."""
    _, qkv, o, attended, s, mean1, rstd1, _, pre, _, t, mean2, rstd2 = saved
    dz = grad if context.h == 1 else grad * context.h
    dt, sums2 = ops.norm_backward_add(dz, t, mean2, rstd2, w.ln2_weight, None)
    d_down = context.dropped(dt, FFN).to(w.down_weight.dtype)
    d_pre = ops.activation_backward(ops.linear_backward(d_down, w.down_weight), pre, context.activation)
    dy = ops.linear_backward(d_pre, w.up_weight) + dt
    ds, sums1 = ops.norm_backward_add(dy, s, mean1, rstd1, w.ln1_weight, None)
    d_proj = context.dropped(ds, PROJECTION).to(w.proj_weight.dtype)
    d_qkv = context.attention_backward(ops.linear_backward(d_proj, w.proj_weight), qkv, o, attended)
    dx = ops.linear_backward(d_qkv, w.qkv_weight) + ds
    if context.h != 1:
        dx += grad - dz
    return dx, (dz, sums2, d_down, d_pre, dy, sums1, d_proj, d_qkv)


def weight_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, inner: Tensors, into: Weights[torch.Tensor | None]
) -> None:
    """Writes the parameters' gradients into [J, ...] tensors of any strides; None stands for one not wanted."""
    x, _, o, _, s, mean1, rstd1, y, _, a, t, mean2, rstd2 = saved
    dz, sums2, d_down, d_pre, dy, sums1, d_proj, d_qkv = inner
    ops.norm_weight_grads(dz, sums2, t, mean2, rstd2, into.ln2_weight, into.ln2_bias)
    ops.linear_weight_grads(d_down, a, into.down_weight, into.down_bias)
    ops.linear_weight_grads(d_pre, y, into.up_weight, into.up_bias)
    ops.norm_weight_grads(dy, sums1, s, mean1, rstd1, into.ln1_weight, into.ln1_bias)
    ops.linear_weight_grads(d_proj, o, into.proj_weight, into.proj_bias)
    ops.linear_weight_grads(d_qkv, x, into.qkv_weight, into.qkv_bias)
