"""The pre-LN step and its hand-written backward, for J independent blocks at once.

    y = x + drop(O attention(QKV LN1 x)),  out = x + h ((y - x) + drop(W2 gelu(W1 LN2 y)))

x, y, out are [J, M, D], M = batch x sequence. The backward comes in two halves: :func:`input_vjp` gives the gradient
for x and what the other half will need; :func:`weight_vjp` writes the parameters' gradients, now or later. Each is made
of the same for y alone (``attention_...``) and for the rest (``ffn_...``), between which a decoder does something else
(cross_norm.py).
"""

from __future__ import annotations

import torch

from . import ops
from .dropout import FFN, PROJECTION
from .settings import Weights
from .step_context import StepContext

Tensors = tuple[torch.Tensor, ...]
KEPT = 6  # tensors that attention keeps for the way back


def forward(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One step, with nothing saved."""
    return ffn_forward(context, w, attention_forward(context, w, x), x)


def forward_train(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """One step, and what its backward needs; every tensor of it has the leading dimension J."""
    y, of_attention = attention_train(context, w, x)
    out, of_ffn = ffn_train(context, w, y, x)
    return out, (*of_attention, *of_ffn)


def input_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, grad: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    """The gradient for x, and the gradients inside the step that :func:`weight_vjp` takes."""
    h = context.h
    scaled = grad if h == 1 else grad * h
    dy, of_ffn = ffn_input_vjp(context, w, saved[KEPT:], scaled)
    dx, of_attention = attention_input_vjp(context, w, saved[:KEPT], dy)
    if h != 1:
        dx += grad - scaled
    return dx, (*of_attention, *of_ffn)


def weight_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, inner: Tensors, into: Weights[torch.Tensor | None]
) -> None:
    """Writes the parameters' gradients into [J, ...] tensors of any strides; None stands for one not wanted."""
    ffn_weight_vjp(w, saved[KEPT:], inner[4:], into)
    attention_weight_vjp(w, saved[:KEPT], inner[:4], into)


# --- y = x + drop(O attention(QKV LN1 x)) ----------------------------------------------------------------------------


def attention_forward(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    qkv = ops.ln_linear(x, w.ln1_weight, w.ln1_bias, w.qkv_weight, w.qkv_bias, context.eps, "none")
    return context.onto_stream(context.attention(qkv), w.proj_weight, w.proj_bias, x, x, 1, PROJECTION)


def attention_train(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    qkv, mean, rstd, _ = ops.ln_linear_train(x, w.ln1_weight, w.ln1_bias, w.qkv_weight, w.qkv_bias, context.eps, "none")
    o, attended = context.attention_train(qkv)
    y = context.onto_stream(o, w.proj_weight, w.proj_bias, x, x, 1, PROJECTION)
    return y, (x, mean, rstd, qkv, o, attended)


def attention_input_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, dy: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    x, mean, rstd, qkv, o, attended = saved
    d_proj = context.dropped(dy, PROJECTION).to(w.proj_weight.dtype)
    d_qkv = context.attention_backward(ops.linear_backward(d_proj, w.proj_weight), qkv, o, attended)
    d_n = ops.linear_backward(d_qkv, w.qkv_weight)
    dx, sums = ops.norm_backward_add(d_n, x, mean, rstd, w.ln1_weight, dy)
    return dx, (d_proj, d_qkv, d_n, sums)


def attention_weight_vjp(
    w: Weights[torch.Tensor], saved: Tensors, inner: Tensors, into: Weights[torch.Tensor | None]
) -> None:
    x, mean, rstd, _, o, _ = saved
    d_proj, d_qkv, d_n, sums = inner
    ops.linear_weight_grads(d_proj, o, into.proj_weight, into.proj_bias)
    ops.norm_linear_weight_grads(
        d_qkv, d_n, sums, x, mean, rstd, w.ln1_weight, w.ln1_bias,
        (into.qkv_weight, into.qkv_bias, into.ln1_weight, into.ln1_bias),
    )  # fmt: skip


# --- out = x + h ((y - x) + drop(W2 gelu(W1 LN2 y))) -----------------------------------------------------------------


def ffn_forward(context: StepContext, w: Weights[torch.Tensor], y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if not context.drops:
        return ops.mlp(y, x, w, context.h, context.eps, context.activation)
    a = ops.ln_linear(y, w.ln2_weight, w.ln2_bias, w.up_weight, w.up_bias, context.eps, context.activation)
    return context.onto_stream(a, w.down_weight, w.down_bias, y, x, context.h, FFN)


def ffn_train(
    context: StepContext, w: Weights[torch.Tensor], y: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    a, mean, rstd, pre = ops.ln_linear_train(
        y, w.ln2_weight, w.ln2_bias, w.up_weight, w.up_bias, context.eps, context.activation
    )
    return context.onto_stream(a, w.down_weight, w.down_bias, y, x, context.h, FFN), (y, mean, rstd, pre, a)


def ffn_input_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, scaled: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    """The gradient for y, where ``scaled`` is h times the one for out."""
    y, mean, rstd, pre, _ = saved
    d_down = context.dropped(scaled, FFN).to(w.down_weight.dtype)
    d_pre = ops.activation_backward(ops.linear_backward(d_down, w.down_weight), pre, context.activation)
    d_n = ops.linear_backward(d_pre, w.up_weight)
    dy, sums = ops.norm_backward_add(d_n, y, mean, rstd, w.ln2_weight, scaled)
    return dy, (d_down, d_pre, d_n, sums)


def ffn_weight_vjp(
    w: Weights[torch.Tensor], saved: Tensors, inner: Tensors, into: Weights[torch.Tensor | None]
) -> None:
    y, mean, rstd, _, a = saved
    d_down, d_pre, d_n, sums = inner
    ops.linear_weight_grads(d_down, a, into.down_weight, into.down_bias)
    ops.norm_linear_weight_grads(
        d_pre, d_n, sums, y, mean, rstd, w.ln2_weight, w.ln2_bias,
        (into.up_weight, into.up_bias, into.ln2_weight, into.ln2_bias),
    )  # fmt: skip
