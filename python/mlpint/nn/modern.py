"""The step of today's language models and its hand-written backward, for J independent blocks at once.

    y = x + drop(N3 O attention(heads(QKV N1 x))),  out = x + h ((y - x) + drop(N4 W2 f(W1 N2 y)))

N is an RMSNorm or a LayerNorm: N1 and N2 (norm "pre"), N3 and N4 ("output", as in OLMo 2) or all four ("sandwich", as
in Gemma 2); where there is none, the values go through. Heads are those of heads.py; f is gelu, or act(a) b for
(a, b) = W1 N2 y; any linear map may be without its bias. Shapes and the two halves of the backward are those of
pre_norm.py, which has the kernels.
"""

from __future__ import annotations

import torch

from . import ops
from .dropout import FFN, PROJECTION
from .heads import packed, packed_backward
from .settings import BlockSettings, Weights
from .step_context import StepContext

Tensors = tuple[torch.Tensor, ...]


def forward(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One step, with nothing saved."""
    settings = context.settings
    qkv = ops.linear(_norm(context, x, w.ln1_weight, w.ln1_bias)[0], w.qkv_weight, w.qkv_bias)
    o = context.attention(packed(context, w, qkv)[0])
    y, _ = _onto_stream(context, o, _attention_output(w), x, x, 1, PROJECTION)
    a = _inner(settings, w, _norm(context, y, w.ln2_weight, w.ln2_bias)[0])
    return _onto_stream(context, a, _ffn_output(w), y, x, context.h, FFN)[0]


def forward_train(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """One step, and what its backward needs; every tensor of it has the leading dimension J."""
    settings = context.settings
    n1, mean1, rstd1 = _norm(context, x, w.ln1_weight, w.ln1_bias)
    qkv = ops.linear(n1, w.qkv_weight, w.qkv_bias)
    into, q_rms, k_rms = packed(context, w, qkv)
    o, attended = context.attention_train(into)
    y, out1 = _onto_stream(context, o, _attention_output(w), x, x, 1, PROJECTION)
    n2, mean2, rstd2 = _norm(context, y, w.ln2_weight, w.ln2_bias)
    pre = ops.linear(n2, w.up_weight, w.up_bias)
    a = activated(settings, pre)
    out, out2 = _onto_stream(context, a, _ffn_output(w), y, x, context.h, FFN)
    if not settings.qk_norm:
        qkv = qkv.new_empty(len(qkv), 0)  # which no backward reads
    saved = (x, mean1, rstd1, n1, qkv, q_rms, k_rms, into, o, attended, y, mean2, rstd2, n2, pre, a)
    return out, (*saved, *out1, *out2)


def input_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, grad: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    """The gradient for x, and the gradients inside the step that :func:`weight_vjp` takes."""
    x, mean1, rstd1, _, qkv, q_rms, k_rms, into, o, attended, y, mean2, rstd2, _, pre, _ = saved[:16]
    u1, mean3, rstd3, u2, mean4, rstd4 = saved[16:]
    settings, h = context.settings, context.h
    scaled = grad if h == 1 else grad * h
    d_out2 = context.dropped(scaled, FFN)
    d_down = _norm_backward(d_out2, u2, mean4, rstd4, w.ln2_out_weight).to(w.down_weight.dtype)
    d_pre = _activated_backward(settings, ops.linear_backward(d_down, w.down_weight), pre)
    d_n2 = ops.linear_backward(d_pre, w.up_weight)
    dy = _plus(_norm_backward(d_n2, y, mean2, rstd2, w.ln2_weight), scaled)
    d_out1 = context.dropped(dy, PROJECTION)
    d_proj = _norm_backward(d_out1, u1, mean3, rstd3, w.ln1_out_weight).to(w.proj_weight.dtype)
    d_into = context.attention_backward(ops.linear_backward(d_proj, w.proj_weight), into, o, attended)
    d_qkv, norms = packed_backward(context, w, d_into, qkv, q_rms, k_rms)
    d_n1 = ops.linear_backward(d_qkv, w.qkv_weight)
    dx = _plus(_norm_backward(d_n1, x, mean1, rstd1, w.ln1_weight), dy)
    if h != 1:
        dx += grad - scaled
    none = grad.new_empty(len(grad), 0)  # the gradients that no norm asks for are not kept
    ends = (none, none) if w.ln1_out_weight is None else (d_out1, d_out2)
    return dx, (d_down, d_pre, d_n2, d_proj, d_qkv, d_n1, *ends, *norms)


def weight_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, inner: Tensors, into: Weights[torch.Tensor | None]
) -> None:
    """Writes the parameters' gradients into [J, ...] tensors of any strides; None stands for one not wanted."""
    x, mean1, rstd1, n1, _, _, _, _, o, _, y, mean2, rstd2, n2, _, a = saved[:16]
    u1, mean3, rstd3, u2, mean4, rstd4 = saved[16:]
    d_down, d_pre, d_n2, d_proj, d_qkv, d_n1, d_out1, d_out2, of_q, of_k = inner
    ops.linear_weight_grads(d_down, a, into.down_weight, into.down_bias)
    ops.linear_weight_grads(d_pre, n2, into.up_weight, into.up_bias)
    ops.linear_weight_grads(d_proj, o, into.proj_weight, into.proj_bias)
    ops.linear_weight_grads(d_qkv, n1, into.qkv_weight, into.qkv_bias)
    _norm_weight_grads(d_n1, x, mean1, rstd1, into.ln1_weight, into.ln1_bias)
    _norm_weight_grads(d_n2, y, mean2, rstd2, into.ln2_weight, into.ln2_bias)
    _norm_weight_grads(d_out1, u1, mean3, rstd3, into.ln1_out_weight, into.ln1_out_bias)
    _norm_weight_grads(d_out2, u2, mean4, rstd4, into.ln2_out_weight, into.ln2_out_bias)
    for target, found in ((into.q_norm_weight, of_q), (into.k_norm_weight, of_k)):
        if target is not None:
            target.copy_(found)


def _plus(used_up: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sum in the wider dtype: under autocast a gradient behind a linear map is narrow, the stream's is not."""
    return used_up.add_(other) if used_up.dtype == other.dtype else used_up + other


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
    normed, mean, rstd = _norm(context, update, norm_weight, norm_bias)
    return ops.residual_add(context.dropped(normed, place), y, x, h), (update, mean, rstd)


# --- norms: without a bias an RMSNorm, whose mean stays empty ---------------------------------------------------------


def _norm(
    context: StepContext, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalised state, mean and 1 / deviation, [J, M]; without a weight there is no norm."""
    if weight is None:
        return x, x.new_empty(len(x), 0), x.new_empty(len(x), 0)
    if context.settings.normalization == "layer" and bias is not None:
        return ops.ln(x, weight, bias, context.eps)
    rms = ops.inverse_rms(x, context.eps)
    return ops.rms_norm(x, rms, weight), x.new_empty(len(x), 0), rms


def _norm_backward(
    grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """The gradient for what was normalised; without a norm the one that is given."""
    if weight is None:
        return grad
    if mean.numel():
        return ops.ln_backward_add(grad, x, mean, rstd, weight, None)[0]
    return ops.rms_norm_backward(grad, x, rstd, weight).to(x.dtype)


def _norm_weight_grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    if not rstd.numel():
        return
    if mean.numel():
        # The kernel's sums, where it is taken, are not kept by this step: they are taken here for all.
        ops.ln_weight_grads(grad, x.new_empty(len(x), 0), x, mean, rstd, weight, bias)
    elif weight is not None:
        weight.copy_(ops.rms_norm_weight_grad(grad, x, rstd))


# --- activations ------------------------------------------------------------------------------------------------------


def activated(settings: BlockSettings, pre: torch.Tensor) -> torch.Tensor:
    """The inner width's values: f of the first linear map's output."""
    if not settings.gated:
        return ops.activate(pre, settings.activation)
    gate, up = pre.chunk(2, -1)
    return ops.activate(gate, settings.activation) * up


def _inner(settings: BlockSettings, w: Weights[torch.Tensor], n: torch.Tensor) -> torch.Tensor:
    """The inner width's values with nothing saved: of gated ones a half at a time, in a half of the memory."""
    if not settings.gated:
        return activated(settings, ops.linear(n, w.up_weight, w.up_bias))
    biases = (None, None) if w.up_bias is None else w.up_bias.chunk(2, 1)
    gate, up = (ops.linear(n, part, bias) for part, bias in zip(w.up_weight.chunk(2, 1), biases, strict=True))
    return up.mul_(ops.activate(gate, settings.activation))


def _activated_backward(settings: BlockSettings, grad: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    if not settings.gated:
        return ops.activation_backward(grad, pre, settings.activation)
    gate, up = pre.chunk(2, -1)
    d_pre = torch.empty_like(pre)
    d_gate, d_up = d_pre.chunk(2, -1)
    ops.activation_backward(torch.mul(grad, up, out=d_up), gate, settings.activation, d_gate)
    torch.mul(ops.activate(gate, settings.activation), grad, out=d_up)
    return d_pre
