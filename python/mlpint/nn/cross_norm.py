"""The pre-LN step of a decoder, which attends to a memory too, and its hand-written backward, for J blocks at once.

    y = x + drop(O attention(QKV LN1 x)),  z = y + drop(Oc attention(Qc LNc y; KVc LNm memory)),
    out = x + h ((z - x) + drop(W2 gelu(W1 LN2 z)))

x and out are [J, B T, D], the memory [J, B S, D]. Its gradient is the last of those inside the step. All else is as in
pre_norm.py, whose parts the first and the last of these three are.
"""

from __future__ import annotations

import torch

from . import ops, pre_norm
from .dropout import CROSS_PROJECTION
from .settings import Weights
from .step_context import StepContext

Tensors = tuple[torch.Tensor, ...]
_KEPT = 10  # tensors that cross-attention keeps for the way back


def forward(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One step, with nothing saved."""
    y = pre_norm.attention_forward(context, w, x)
    memory = context.memory
    q = ops.ln_linear(y, w.ln_cross_weight, w.ln_cross_bias, w.cross_q_weight, w.cross_q_bias, context.eps, "none")
    kv = ops.ln_linear(
        memory, w.ln_memory_weight, w.ln_memory_bias, w.cross_kv_weight, w.cross_kv_bias, context.eps, "none"
    )
    o = context.cross_attention(q, kv)
    z = context.onto_stream(o, w.cross_proj_weight, w.cross_proj_bias, y, y, 1, CROSS_PROJECTION)
    return pre_norm.ffn_forward(context, w, z, x)


def forward_train(context: StepContext, w: Weights[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """One step, and what its backward needs; every tensor of it has the leading dimension J."""
    y, of_attention = pre_norm.attention_train(context, w, x)
    memory = context.memory
    q, mean_y, rstd_y, _ = ops.ln_linear_train(
        y, w.ln_cross_weight, w.ln_cross_bias, w.cross_q_weight, w.cross_q_bias, context.eps, "none"
    )
    kv, mean_m, rstd_m, _ = ops.ln_linear_train(
        memory, w.ln_memory_weight, w.ln_memory_bias, w.cross_kv_weight, w.cross_kv_bias, context.eps, "none"
    )
    o, attended = context.cross_attention_train(q, kv)
    z = context.onto_stream(o, w.cross_proj_weight, w.cross_proj_bias, y, y, 1, CROSS_PROJECTION)
    out, of_ffn = pre_norm.ffn_train(context, w, z, x)
    return out, (*of_attention, y, mean_y, rstd_y, memory, mean_m, rstd_m, q, kv, o, attended, *of_ffn)


def input_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, grad: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    """The gradient for x, and the gradients inside the step that :func:`weight_vjp` takes, the memory's at the end."""
    first, of_ffn = saved[: pre_norm.KEPT], saved[pre_norm.KEPT + _KEPT :]
    y, mean_y, rstd_y, memory, mean_m, rstd_m, q, kv, o, attended = saved[pre_norm.KEPT :][:_KEPT]
    h = context.h
    scaled = grad if h == 1 else grad * h
    dz, inner_ffn = pre_norm.ffn_input_vjp(context, w, of_ffn, scaled)
    d_proj = context.dropped(dz, CROSS_PROJECTION).to(w.cross_proj_weight.dtype)
    d_o = ops.linear_backward(d_proj, w.cross_proj_weight)
    d_q, d_kv = context.cross_attention_backward(d_o, q, kv, o, attended)
    d_nm = ops.linear_backward(d_kv, w.cross_kv_weight)
    d_memory, sums_m = ops.norm_backward_add(d_nm, memory, mean_m, rstd_m, w.ln_memory_weight, None)
    d_ny = ops.linear_backward(d_q, w.cross_q_weight)
    dy, sums_y = ops.norm_backward_add(d_ny, y, mean_y, rstd_y, w.ln_cross_weight, dz)
    dx, inner_attention = pre_norm.attention_input_vjp(context, w, first, dy)
    if h != 1:
        dx += grad - scaled
    return dx, (*inner_attention, *inner_ffn, d_proj, d_q, d_ny, sums_y, d_kv, d_nm, sums_m, d_memory)


def weight_vjp(
    context: StepContext, w: Weights[torch.Tensor], saved: Tensors, inner: Tensors, into: Weights[torch.Tensor | None]
) -> None:
    """Writes the parameters' gradients into [J, ...] tensors of any strides; None stands for one not wanted."""
    pre_norm.ffn_weight_vjp(w, saved[pre_norm.KEPT + _KEPT :], inner[4:8], into)
    y, mean_y, rstd_y, memory, mean_m, rstd_m, _, _, o, _ = saved[pre_norm.KEPT :][:_KEPT]
    d_proj, d_q, d_ny, sums_y, d_kv, d_nm, sums_m, _ = inner[8:]
    ops.linear_weight_grads(d_proj, o, into.cross_proj_weight, into.cross_proj_bias)
    ops.norm_linear_weight_grads(
        d_kv, d_nm, sums_m, memory, mean_m, rstd_m, w.ln_memory_weight, w.ln_memory_bias,
        (into.cross_kv_weight, into.cross_kv_bias, into.ln_memory_weight, into.ln_memory_bias),
    )  # fmt: skip
    ops.norm_linear_weight_grads(
        d_q, d_ny, sums_y, y, mean_y, rstd_y, w.ln_cross_weight, w.ln_cross_bias,
        (into.cross_q_weight, into.cross_q_bias, into.ln_cross_weight, into.ln_cross_bias),
    )  # fmt: skip
    pre_norm.attention_weight_vjp(w, saved[: pre_norm.KEPT], inner[:4], into)
