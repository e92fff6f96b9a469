"""The operations that J independent blocks are made of: plain torch for any device, or kernels where they are chosen.

All carry a leading dimension J: activations [J, M, D] with M = batch x sequence, weights [J, out, in] as strided views
of stacked storage. At J = 1 torch's unbatched operations are the faster ones and are taken. Nothing here is recorded
by autograd; see pre_norm.py and post_norm.py for what is put together from it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .kernels import kernel
from .settings import Weights


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns x W^T + b in the dtype of W: [J, M, in] -> [J, M, out]."""
    x = x.to(weight.dtype)
    if bias is None:
        return torch.mm(x[0], weight[0].t()).unsqueeze(0) if len(x) == 1 else torch.bmm(x, weight.transpose(1, 2))
    if len(x) == 1:
        return torch.addmm(bias[0], x[0], weight[0].t()).unsqueeze(0)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def linear_backward(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient for the input of :func:`linear`."""
    grad = grad.to(weight.dtype)
    return torch.mm(grad[0], weight[0]).unsqueeze(0) if len(grad) == 1 else torch.bmm(grad, weight)


def linear_weight_grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    """Writes the parameters' gradients of :func:`linear` into views [J, out, in] and [J, out], where given."""
    if weight is not None:
        transposed, x = grad.transpose(1, 2), x.to(grad.dtype)
        if weight.dtype != grad.dtype:
            weight.copy_(torch.bmm(transposed, x))
        elif len(grad) == 1:
            torch.mm(transposed[0], x[0], out=weight[0])
        else:
            torch.bmm(transposed, x, out=weight)
    if bias is not None:
        torch.sum(grad, 1, dtype=bias.dtype, out=bias)


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm of [J, M, D] with [J, D] each: (y, mean [J, M], rstd [J, M]); without a bias RMSNorm, mean [J, 0]."""
    if bias is None:
        rms = inverse_rms(x, eps)
        return rms_norm(x, rms, weight), x.new_empty(len(x), 0), rms
    if len(x) == 1:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight[0], bias[0], eps)
    else:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        y = torch.addcmul(bias.unsqueeze(1), y, weight.unsqueeze(1))
    return y, mean.squeeze(-1), rstd.squeeze(-1)


def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """What :func:`norm` gives, where no backward will want more of it."""
    if bias is None and len(x) == 1:
        return torch.rms_norm(x[0], x.shape[-1:], weight[0], eps).unsqueeze(0)
    return norm(x, weight, bias, eps)[0]


def norm_backward_add(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient for the input of :func:`norm` plus that of the residual path, and where the kernel is taken the
    gradients of the norm's weight and bias, [J, 2, D]; elsewhere [J, 0]."""
    grad = grad.to(x.dtype)
    rms = not mean.numel()
    module = kernel("ln_backward_add", x.shape[2], x.shape[1], len(x), x, *[t for t in (residual,) if t is not None])
    if module:
        wide = torch.promote_types(x.dtype, torch.float32)
        dx, *sums = module.ln_backward_add(
            _by_rows(grad),
            x,
            None if rms else mean.to(wide).contiguous(),
            rstd.to(wide).contiguous(),
            weight,
            None if residual is None else _by_rows(residual),
        )
        return dx, torch.stack(sums, 1)
    if rms:
        dx = rms_norm_backward(grad, x, rstd, weight).to(x.dtype)
    else:
        single = len(x) == 1
        scaled = grad if single else grad * weight.unsqueeze(1)
        dx = torch.ops.aten.native_layer_norm_backward(
            scaled,
            x,
            x.shape[-1:],
            mean.contiguous(),  # torch reads these two as if they were, and takes any shape
            rstd.contiguous(),
            weight[0] if single else None,
            None,
            [True, False, False],
        )[0]
    return dx if residual is None else plus(dx, residual), x.new_empty(len(x), 0)


def _by_rows(gradient: torch.Tensor) -> torch.Tensor:
    """As kernels take it; that of a sum is one number, expanded."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


def plus(used_up: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sum in the wider dtype: under autocast a gradient behind a linear map is narrow, the stream's is not."""
    return used_up.add_(other) if used_up.dtype == other.dtype else used_up + other


def norm_weight_grads(
    grad: torch.Tensor,
    sums: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    normalized: torch.Tensor | None = None,
) -> None:
    """Writes the parameters' gradients of :func:`norm` into views [J, D], where given. ``sums`` are those that
    :func:`norm_backward_add` may have found; ``normalized``, (x - mean) rstd, is used up."""
    if sums.numel():
        for into, gradient in zip((weight, bias), sums.unbind(1), strict=True):
            if into is not None:
                into.copy_(gradient)
        return
    if weight is not None:
        if normalized is None:
            normalized = _normalized(x, mean, rstd)
        torch.sum(normalized.mul_(grad), 1, dtype=weight.dtype, out=weight)
    if bias is not None:
        torch.sum(grad, 1, dtype=bias.dtype, out=bias)


def _normalized(x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    return (x - mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1)) if mean.numel() else x * rstd.unsqueeze(-1)


def norm_linear_weight_grads(
    grad: torch.Tensor,
    grad_normalized: torch.Tensor,
    sums: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    into: tuple[torch.Tensor | None, ...],
) -> None:
    """Of a linear map behind a norm, whose output was not kept: into (weight, bias, ln_weight, ln_bias)."""
    weight, bias, into_ln_weight, into_ln_bias = into
    normalized = None
    if weight is not None:
        normalized = _normalized(x, mean, rstd)
        scale = ln_weight.unsqueeze(1)
        x_hat = normalized * scale if ln_bias is None else torch.addcmul(ln_bias.unsqueeze(1), normalized, scale)
        linear_weight_grads(grad, x_hat, weight, bias)
    else:
        linear_weight_grads(grad, grad, None, bias)
    norm_weight_grads(grad_normalized, sums, x, mean, rstd, into_ln_weight, into_ln_bias, normalized)


def residual_add(update: torch.Tensor, y: torch.Tensor, x: torch.Tensor, h: float) -> torch.Tensor:
    """Returns x + h ((y - x) + update); the update's memory is used up where the dtypes agree."""
    total = update.add_(y) if update.dtype == y.dtype else y + update
    return total if h == 1 else torch.lerp(x, total, h)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, in single precision at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.square().mean(-1).add(eps).rsqrt()


def rms_norm(x: torch.Tensor, rms: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm of [J, ..., D] with [J, D], by the :func:`inverse_rms` of x. Differentiable."""
    return (x * rms.unsqueeze(-1)).to(x.dtype) * _over_rows(weight, x)


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, rms: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient for the input of :func:`rms_norm`, in single precision at least."""
    scaled, x = (grad * _over_rows(weight, x)).to(rms.dtype), x.to(rms.dtype)
    # (x . scaled) rms^2 / D is the part along x that the norm takes out.
    along = torch.linalg.vecdot(x, scaled).mul_(rms.square()).div_(x.shape[-1])
    return scaled.addcmul_(x, along.unsqueeze(-1), value=-1).mul_(rms.unsqueeze(-1))


def rms_norm_weight_grad(grad: torch.Tensor, x: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
    """The gradient for the weight of :func:`rms_norm`, [J, D]."""
    return (x * rms.unsqueeze(-1)).mul_(grad).flatten(1, -2).sum(1)


def _over_rows(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[J, D] with ones for the dimensions of x [J, ..., D] between."""
    return weight.view(len(weight), *[1] * (x.dim() - 2), -1)


# --- fused pairs, by the names of the kernels that stand in for them -------------------------------------------------


def activate(pre: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of that name: "none", "gelu", "gelu_tanh", "relu" or "silu"."""
    if activation == "none":
        return pre
    if activation == "silu":
        return F.silu(pre)
    if activation == "relu":
        return F.relu(pre)
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_backward(
    grad: torch.Tensor, pre: torch.Tensor, activation: str, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient for the argument of an activation that is not "none"; written into a tensor if one is given."""
    out: dict[str, torch.Tensor] = {} if into is None else {"grad_input": into}
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, pre, **out)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, pre, 0, **out)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, pre, approximate=approximate, **out)


def ln_linear(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
) -> torch.Tensor:
    """Returns activation(norm(x) W^T + b), with nothing saved."""
    module = kernel("ln_linear", x.shape[2], x.shape[1], len(x), x, ln_weight, weight)
    if module:
        return module.ln_linear(x, ln_weight, ln_bias, weight, bias, eps, activation)
    return activate(linear(normed(x, ln_weight, ln_bias, eps), weight, bias), activation)


def ln_linear_train(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What :func:`ln_linear` gives and its backward needs: (y, mean, rstd, pre-activation).

    Without an activation the kernel leaves the last one empty.
    """
    module = kernel("ln_linear", x.shape[2], x.shape[1], len(x), x, ln_weight, weight)
    if module:
        return module.ln_linear_train(x, ln_weight, ln_bias, weight, bias, eps, activation)
    normalized, mean, rstd = norm(x, ln_weight, ln_bias, eps)
    pre = linear(normalized, weight, bias)
    return activate(pre, activation), mean, rstd, pre


def gated_linear(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
) -> torch.Tensor:
    """Returns activation(g) u, (g, u) = norm(x) W^T + b, with nothing saved."""
    module = kernel("gated_linear", x.shape[2], x.shape[1], len(x), x, ln_weight, weight)
    if module:
        return module.gated_linear(x, ln_weight, ln_bias, weight, bias, eps, activation)
    return gated(normed(x, ln_weight, ln_bias, eps), weight, bias, activation)


def gated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """:func:`gated_linear` of what is normed already: a half at a time, in a half of the memory."""
    biases = (None, None) if bias is None else bias.chunk(2, 1)
    gate, up = (linear(x, part, b) for part, b in zip(weight.chunk(2, 1), biases, strict=True))
    return up.mul_(activate(gate, activation))


def gated_linear_train(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What :func:`gated_linear` gives and its backward needs: (y, mean, rstd, (g, u))."""
    module = kernel("gated_linear", x.shape[2], x.shape[1], len(x), x, ln_weight, weight)
    if module:
        return module.gated_linear_train(x, ln_weight, ln_bias, weight, bias, eps, activation)
    normalized, mean, rstd = norm(x, ln_weight, ln_bias, eps)
    pre = linear(normalized, weight, bias)
    return gate(pre, activation), mean, rstd, pre


def gate(pre: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(g) u of (g, u)."""
    g, u = pre.chunk(2, -1)
    return activate(g, activation) * u


def gate_backward(grad: torch.Tensor, pre: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient for (g, u) of :func:`gate`."""
    module = kernel("gated_backward", grad.shape[2], grad.shape[1], len(grad), grad, pre)
    if module:
        return module.gated_backward(grad.contiguous(), pre.contiguous(), activation)
    g, u = pre.chunk(2, -1)
    d_pre = torch.empty_like(pre)
    d_g, d_u = d_pre.chunk(2, -1)
    activation_backward(torch.mul(grad, u, out=d_u), g, activation, d_g)
    torch.mul(activate(g, activation), grad, out=d_u)
    return d_pre


def linear_axpy(
    a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, x: torch.Tensor, h: float
) -> torch.Tensor:
    """Returns x + h ((y - x) + a W^T + b)."""
    module = kernel("linear_axpy", a.shape[2], a.shape[1], len(a), a, weight, x)
    if module:
        return module.linear_axpy(a, weight, bias, y, x, h)
    if not a.dtype == weight.dtype == y.dtype:
        return residual_add(linear(a, weight, bias), y, x, h)
    # The product is added up in the memory of y + b: a pass less than with the bias first and y last.
    if len(a) > 1:
        transposed = weight.transpose(1, 2)
        total = torch.baddbmm(y, a, transposed) if bias is None else (y + bias.unsqueeze(1)).baddbmm_(a, transposed)
    else:
        transposed = weight[0].t()
        total = torch.addmm(y[0], a[0], transposed) if bias is None else (y[0] + bias).addmm_(a[0], transposed)
        total = total.unsqueeze(0)
    return total if h == 1 else torch.lerp(x, total, h)


def mlp(
    y: torch.Tensor, x: torch.Tensor, w: Weights[torch.Tensor], h: float, eps: float, activation: str
) -> torch.Tensor:
    """Returns x + h ((y - x) + W2 activation(W1 LN2(y))), with nothing saved."""
    module = kernel("mlp", y.shape[2], y.shape[1], len(y), y, w.ln2_weight, w.up_weight)
    if module:
        parts = (w.ln2_weight, w.ln2_bias, w.up_weight, w.up_bias, w.down_weight, w.down_bias)
        return module.mlp(y, x, *parts, h, eps, activation)
    a = ln_linear(y, w.ln2_weight, w.ln2_bias, w.up_weight, w.up_bias, eps, activation)
    return linear_axpy(a, w.down_weight, w.down_bias, y, x, h)
