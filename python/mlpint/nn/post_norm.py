"""The post-LN step (BERT, and the transformer of 2017) and its hand-written backward, for J independent blocks at once.

    y = LN1(x + drop(O attention(QKV x))),  z = LN2(y + drop(W2 gelu(W1 y))),  out = x + h (z - x)

As pre_norm.py otherwise.
"""

from __future__ import annotations

import torch

from . import ops
from .call import Call
from .dropout import FFN, PROJECTION
from .settings import Weights

Tensors = tuple[torch.Tensor, ...]


def forward(call: Call, w: Weights, x: torch.Tensor) -> torch.Tensor:
    """One step, nothing saved."""
    return forward_train(call, w, x, attend=lambda qkv: (call.attention(qkv), qkv))[0]


def forward_train(call: Call, w: Weights, x: torch.Tensor, attend=None) -> tuple[torch.Tensor, Tensors]:
    """One step, and what its backward needs; every tensor of it has the leading dimension J."""
    qkv = ops.linear(x, w.qkv_weight, w.qkv_bias)
    o, attended = (attend or call.attention_train)(qkv)
    s = call.onto_stream(o, w.proj_weight, w.proj_bias, x, x, 1, PROJECTION)
    y, mean1, rstd1 = ops.ln(s, w.ln1_weight, w.ln1_bias, call.eps)
    pre = ops.linear(y, w.up_weight, w.up_bias)
    a = ops.activate(pre, call.activation)
    t = call.onto_stream(a, w.down_weight, w.down_bias, y, y, 1, FFN)
    z, mean2, rstd2 = ops.ln(t, w.ln2_weight, w.ln2_bias, call.eps)
    out = z if call.h == 1 else torch.lerp(x, z, call.h)
    return out, (x, qkv, o, attended, s, mean1, rstd1, y, pre, a, t, mean2, rstd2)


def input_vjp(call: Call, w: Weights, saved: Tensors, grad: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """Gradient for x, and the gradients inside the step that :func:`weight_vjp` takes."""
    _, qkv, o, attended, s, mean1, rstd1, _, pre, _, t, mean2, rstd2 = saved
    dz = grad if call.h == 1 else grad * call.h
    dt, sums2 = ops.ln_backward_add(dz, t, mean2, rstd2, w.ln2_weight, None)
    d_down = call.dropped(dt, FFN).to(w.down_weight.dtype)
    d_pre = ops.activation_backward(ops.linear_backward(d_down, w.down_weight), pre, call.activation)
    dy = ops.linear_backward(d_pre, w.up_weight) + dt
    ds, sums1 = ops.ln_backward_add(dy, s, mean1, rstd1, w.ln1_weight, None)
    d_proj = call.dropped(ds, PROJECTION).to(w.proj_weight.dtype)
    d_qkv = call.attention_backward(ops.linear_backward(d_proj, w.proj_weight), qkv, o, attended)
    dx = ops.linear_backward(d_qkv, w.qkv_weight) + ds
    if call.h != 1:
        dx += grad - dz
    return dx, (dz, sums2, d_down, d_pre, dy, sums1, d_proj, d_qkv)


def weight_vjp(call: Call, w: Weights, saved: Tensors, inner: Tensors, into: Weights) -> None:
    """Writes the parameters' gradients into [J, ...] tensors of any strides; None for those not wanted."""
    x, _, o, _, s, mean1, rstd1, y, _, a, t, mean2, rstd2 = saved
    dz, sums2, d_down, d_pre, dy, sums1, d_proj, d_qkv = inner
    ops.ln_weight_grads(dz, sums2, t, mean2, rstd2, into.ln2_weight, into.ln2_bias)
    ops.linear_weight_grads(d_down, a, into.down_weight, into.down_bias)
    ops.linear_weight_grads(d_pre, y, into.up_weight, into.up_bias)
    ops.ln_weight_grads(dy, sums1, s, mean1, rstd1, into.ln1_weight, into.ln1_bias)
    ops.linear_weight_grads(d_proj, o, into.proj_weight, into.proj_bias)
    ops.linear_weight_grads(d_qkv, x, into.qkv_weight, into.qkv_bias)
