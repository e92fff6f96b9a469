"""The step of today's language models and its hand-written backward, for J independent blocks at once.

    y = x + drop(N3 O attention(heads(QKV N1 x))),  out = x + h ((y - x) + drop(N4 W2 f(W1 N2 y)))

N is an RMSNorm or a LayerNorm: N1 and N2 (norm "pre"), N3 and N4 ("output", as in OLMo 2) or all four ("sandwich", as
in Gemma 2); where there is none, the values go through. Heads are those of heads.py; f is gelu, or act(a) b for
(a, b) = W1 N2 y; any linear map may be without its bias. Shapes and the two halves of the backward are those of
pre_norm.py. What a norm gives before a linear map is not kept, but made again for the weights' gradients.
"""

from __future__ import annotations

import torch

from . import ops
from .dropout import FFN, PROJECTION
from .heads import packed, packed_backward
from .settings import Weights
from .step_context import StepContext

Tensors = tuple[torch.Tensor, ...]


def forward(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One step, with nothing saved."""
    eps, activation = context.eps, context.activation
    if w.ln1_weight is None:
        qkv = ops.linear(x, w.qkv_weight, w.qkv_bias)
    else:
        qkv = ops.ln_linear(x, w.ln1_weight, w.ln1_bias, w.qkv_weight, w.qkv_bias, eps, "none")
    o = context.attention(packed(context, w, qkv)[0])
    y, _ = _onto_stream(context, o, _attention_output(w), x, x, 1, PROJECTION)
    if not context.settings.gated:
        a = _inner(context, w, y)[0]
    elif w.ln2_weight is None:
        a = ops.gated(y, w.up_weight, w.up_bias, activation)
    else:
        a = ops.gated_linear(y, w.ln2_weight, w.ln2_bias, w.up_weight, w.up_bias, eps, activation)
    return _onto_stream(context, a, _ffn_output(w), y, x, context.h, FFN)[0]


def forward_train(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """One step, and what its backward needs; every tensor of it has the leading dimension J."""
    none = x.new_empty(len(x), 0)
    if w.ln1_weight is None:
        qkv, mean1, rstd1 = ops.linear(x, w.qkv_weight, w.qkv_bias), none, none
    else:
        qkv, mean1, rstd1, _ = ops.ln_linear_train(
            x, w.ln1_weight, w.ln1_bias, w.qkv_weight, w.qkv_bias, context.eps, "none"
        )
    into, q_rms, k_rms = packed(context, w, qkv)
    o, attended = context.attention_train(into)
    y, out1 = _onto_stream(context, o, _attention_output(w), x, x, 1, PROJECTION)
    a, mean2, rstd2, pre = _inner(context, w, y)
    out, out2 = _onto_stream(context, a, _ffn_output(w), y, x, context.h, FFN)
    if not context.settings.qk_norm:
        qkv = none  # which no backward reads
    saved = (x, mean1, rstd1, qkv, q_rms, k_rms, into, o, attended, y, mean2, rstd2, pre, a)
    return out, (*saved, *out1, *out2)


def input_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, grad: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    """The gradient for x, and the gradients inside the step that :func:`weight_vjp` takes."""
    x, mean1, rstd1, qkv, q_rms, k_rms, into, o, attended, y, mean2, rstd2, pre, _ = saved[:14]
    u1, mean3, rstd3, u2, mean4, rstd4 = saved[14:]
    settings, h = context.settings, context.h
    scaled = grad if h == 1 else grad * h
    d_out2 = context.dropped(scaled, FFN)
    d_down, sums4 = _norm_backward(d_out2, u2, mean4, rstd4, w.ln2_out_weight, None)
    d_a = ops.linear_backward(d_down.to(w.down_weight.dtype), w.down_weight)
    if settings.gated:
        d_pre = ops.gate_backward(d_a, pre, context.activation)
    else:
        d_pre = ops.activation_backward(d_a, pre, context.activation)
    d_n2 = ops.linear_backward(d_pre, w.up_weight)
    dy, sums2 = _norm_backward(d_n2, y, mean2, rstd2, w.ln2_weight, scaled)
    d_out1 = context.dropped(dy, PROJECTION)
    d_proj, sums3 = _norm_backward(d_out1, u1, mean3, rstd3, w.ln1_out_weight, None)
    d_proj = d_proj.to(w.proj_weight.dtype)
    d_into = context.attention_backward(ops.linear_backward(d_proj, w.proj_weight), into, o, attended)
    d_qkv, norms = packed_backward(context, w, d_into, qkv, q_rms, k_rms)
    d_n1 = ops.linear_backward(d_qkv, w.qkv_weight)
    dx, sums1 = _norm_backward(d_n1, x, mean1, rstd1, w.ln1_weight, dy)
    if h != 1:
        dx += grad - scaled
    none = grad.new_empty(len(grad), 0)  # the gradients that no norm asks for are not kept
    ends = (none, none) if w.ln1_out_weight is None else (d_out1, d_out2)
    starts = (none, none) if w.ln1_weight is None else (d_n1, d_n2)
    d_down = d_down.to(w.down_weight.dtype)
    return dx, (d_down, d_pre, d_proj, d_qkv, *starts, *ends, sums1, sums2, sums3, sums4, *norms)


def weight_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, inner: Tensors, into: Weights[torch.Tensor | None]
) -> None:
    """Writes the parameters' gradients into [J, ...] tensors of any strides; None stands for one not wanted."""
    x, mean1, rstd1, _, _, _, _, o, _, y, mean2, rstd2, _, a = saved[:14]
    u1, mean3, rstd3, u2, mean4, rstd4 = saved[14:]
    d_down, d_pre, d_proj, d_qkv, d_n1, d_n2, d_out1, d_out2, sums1, sums2, sums3, sums4, of_q, of_k = inner
    ops.linear_weight_grads(d_down, a, into.down_weight, into.down_bias)
    ops.linear_weight_grads(d_proj, o, into.proj_weight, into.proj_bias)
    if w.ln1_weight is None:
        ops.linear_weight_grads(d_qkv, x, into.qkv_weight, into.qkv_bias)
        ops.linear_weight_grads(d_pre, y, into.up_weight, into.up_bias)
    else:
        ops.norm_linear_weight_grads(
            d_qkv, d_n1, sums1, x, mean1, rstd1, w.ln1_weight, w.ln1_bias,
            (into.qkv_weight, into.qkv_bias, into.ln1_weight, into.ln1_bias),
        )  # fmt: skip
        ops.norm_linear_weight_grads(
            d_pre, d_n2, sums2, y, mean2, rstd2, w.ln2_weight, w.ln2_bias,
            (into.up_weight, into.up_bias, into.ln2_weight, into.ln2_bias),
        )  # fmt: skip
    if w.ln1_out_weight is not None:
        ops.norm_weight_grads(d_out1, sums3, u1, mean3, rstd3, into.ln1_out_weight, into.ln1_out_bias)
        ops.norm_weight_grads(d_out2, sums4, u2, mean4, rstd4, into.ln2_out_weight, into.ln2_out_bias)
    for target, found in ((into.q_norm_weight, of_q), (into.k_norm_weight, of_k)):
        if target is not None:
            target.copy_(found)


def _inner(context: StepContext, w: Weights[torch.Tensor], y: torch.Tensor) -> Tensors:
    """The inner width's values, mean and 1 / deviation of the norm before it (empty without), and what f was given."""
    eps, activation = context.eps, context.activation
    if w.ln2_weight is None:
        pre, none = ops.linear(y, w.up_weight, w.up_bias), y.new_empty(len(y), 0)
        return (ops.gate if context.settings.gated else ops.activate)(pre, activation), none, none, pre
    train = ops.gated_linear_train if context.settings.gated else ops.ln_linear_train
    return train(y, w.ln2_weight, w.ln2_bias, w.up_weight, w.up_bias, eps, activation)


def _norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`mlpint.nn.ops.norm_backward_add`; without a norm the gradient that is given."""
    if weight is not None:
        return ops.norm_backward_add(grad, x, mean, rstd, weight, residual)
    return grad if residual is None else ops.plus(grad, residual), grad.new_empty(len(grad), 0)


# --- onto the stream: a linear map, and the norm of what it gives where there is one ----------------------------------

Output = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _attention_output(w: Weights[torch.Tensor]) -> Output:
    return w.proj_weight, w.proj_bias, w.ln1_out_weight, w.ln1_out_bias


def _ffn_output(w: Weights[torch.Tensor]) -> Output:
    return w.down_weight, w.down_bias, w.ln2_out_weight, w.ln2_out_bias


def _onto_stream(
    context: StepContext, a: torch.Tensor, output: Output, y: torch.Tensor, x: torch.Tensor, h: float, place: int
) -> tuple[torch.Tensor, Tensors]:
    """x + h ((y - x) + drop(N(a W^T + b))), and of the norm its input, mean and 1 / deviation (empty without norm)."""
    weight, bias, norm_weight, norm_bias = output
    if norm_weight is None:
        none = x.new_empty(len(x), 0)
        return context.onto_stream(a, weight, bias, y, x, h, place), (none, none, none)
    update = ops.linear(a, weight, bias)
    normed, mean, rstd = ops.norm(update, norm_weight, norm_bias, context.eps)
    return context.stepped(normed, y, x, h, place), (update, mean, rstd)
