"""The cases of single operations, in the order of a block's step; see cases.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..nn import ops
from .cases import BACKWARD, Inputs, Key, Operation, Random, Tensors
from .shapes import Shape
from .timing import Call

EPS = 1e-5
H = 0.5  # a step size that no kernel can leave out


class LnLinear(Operation):
    """LayerNorm and the FFN's way up with its GELU."""

    name = op = "ln_linear"

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        (ln_weight, ln_bias), (weight, bias) = r.norm(shape.d), r.linear(shape.ffn, shape.d)
        return {"x": r.normal(shape.m, shape.d), "ln_weight": ln_weight, "ln_bias": ln_bias, "w": weight, "b": bias}

    def plain(self, layer_inputs: Inputs) -> Tensors:
        x, ln_weight, ln_bias, weight, bias = layer_inputs.values()
        n = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, EPS)
        return (F.gelu(F.linear(n, weight, bias), approximate="tanh"),)

    def batched(self, inputs: Inputs, mode: str) -> Call:
        x, ln_weight, ln_bias, weight, bias = inputs.values()
        return lambda: (ops.ln_linear(x, ln_weight, ln_bias, weight, bias, EPS, "gelu_tanh"),)

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.ln_linear import ln_linear

        return lambda: (ln_linear(*inputs.values(), EPS, "gelu_tanh"),)

    def flops(self, shape: Shape, mode: str) -> float:
        return 2.0 * shape.j * shape.m * shape.d * shape.ffn

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        from ..kernels.ln_linear import configs

        return configs(shape.d, shape.dtype)


class LnLinearTrain(LnLinear):
    """The same, keeping what a backward needs."""

    name = "ln_linear_train"

    def plain(self, layer_inputs: Inputs) -> Tensors:
        x, ln_weight, ln_bias, weight, bias = layer_inputs.values()
        n, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], ln_weight, ln_bias, EPS)
        pre = F.linear(n, weight, bias)
        return F.gelu(pre, approximate="tanh"), mean.squeeze(-1), rstd.squeeze(-1), pre

    def batched(self, inputs: Inputs, mode: str) -> Call:
        x, ln_weight, ln_bias, weight, bias = inputs.values()
        return lambda: ops.ln_linear_train(x, ln_weight, ln_bias, weight, bias, EPS, "gelu_tanh")

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.ln_linear import ln_linear_train

        return lambda: ln_linear_train(*inputs.values(), EPS, "gelu_tanh")


class LinearAxpy(Operation):
    """The FFN's way down onto the residual stream."""

    name = op = "linear_axpy"

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        weight, bias = r.linear(shape.d, shape.ffn)
        x, y = r.normal(shape.m, shape.d), r.normal(shape.m, shape.d)
        return {"a": r.normal(shape.m, shape.ffn), "w": weight, "b": bias, "y": y, "x": x}

    def plain(self, layer_inputs: Inputs) -> Tensors:
        a, weight, bias, y, x = layer_inputs.values()
        return (torch.lerp(x, y + F.linear(a, weight, bias), H),)

    def batched(self, inputs: Inputs, mode: str) -> Call:
        a, weight, bias, y, x = inputs.values()
        return lambda: (ops.linear_axpy(a, weight, bias, y, x, H),)

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.linear_axpy import linear_axpy

        return lambda: (linear_axpy(*inputs.values(), H),)

    def flops(self, shape: Shape, mode: str) -> float:
        return 2.0 * shape.j * shape.m * shape.d * shape.ffn

    def key(self, shape: Shape, mode: str) -> Key:
        return Key(self.op, shape.ffn, shape.m, shape.j)

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        from ..kernels.linear_axpy import configs

        return configs(shape.ffn, shape.dtype)


class Projection(LinearAxpy):
    """The attention's projection onto the residual stream."""

    name = "linear_axpy_projection"

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        weight, bias = r.linear(shape.d, shape.d)
        x = r.normal(shape.m, shape.d)
        return {"a": r.normal(shape.m, shape.d), "w": weight, "b": bias, "y": x, "x": x}

    def flops(self, shape: Shape, mode: str) -> float:
        return 2.0 * shape.j * shape.m * shape.d**2

    def key(self, shape: Shape, mode: str) -> Key:
        return Key(self.op, shape.d, shape.m, shape.j)

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        from ..kernels.linear_axpy import configs

        return configs(shape.d, shape.dtype)


class Mlp(Operation):
    """The whole second half of the step; forward only."""

    name = op = "mlp"

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        norm, up, down = r.norm(shape.d), r.linear(shape.ffn, shape.d), r.linear(shape.d, shape.ffn)
        names = ("y", "x", "ln_weight", "ln_bias", "w1", "b1", "w2", "b2")
        return dict(
            zip(names, (r.normal(shape.m, shape.d), r.normal(shape.m, shape.d), *norm, *up, *down), strict=True)
        )

    def plain(self, layer_inputs: Inputs) -> Tensors:
        y, x, ln_weight, ln_bias, w1, b1, w2, b2 = layer_inputs.values()
        n = F.layer_norm(y, y.shape[-1:], ln_weight, ln_bias, EPS)
        a = F.gelu(F.linear(n, w1, b1), approximate="tanh")
        return (torch.lerp(x, y + F.linear(a, w2, b2), H),)

    def batched(self, inputs: Inputs, mode: str) -> Call:
        y, x, ln_weight, ln_bias, w1, b1, w2, b2 = inputs.values()

        def call() -> Tensors:
            # Dispatch decides here: the rival of the one kernel is what the step would do without it.
            return (ops.linear_axpy(ops.ln_linear(y, ln_weight, ln_bias, w1, b1, EPS, "gelu_tanh"), w2, b2, y, x, H),)

        return call

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.mlp import mlp

        return lambda: (mlp(*inputs.values(), H, EPS, "gelu_tanh"),)

    def flops(self, shape: Shape, mode: str) -> float:
        return 4.0 * shape.j * shape.m * shape.d * shape.ffn

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        from ..kernels.mlp import configs

        return configs(shape.d, shape.dtype) if shape.d <= 256 else []


class LnBackward(Operation):
    """Backward of a LayerNorm plus the residual path's gradient."""

    name, op, modes = "ln_backward", "ln_backward_add", (BACKWARD,)
    wanted = ("x", "weight", "bias")

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        weight, bias = r.norm(shape.d)
        x, grad, residual = (r.normal(shape.m, shape.d) for _ in range(3))
        return {"x": x, "weight": weight, "bias": bias, "grad": grad, "residual": residual}

    def plain(self, layer_inputs: Inputs) -> Tensors:
        x, weight, bias, *_ = layer_inputs.values()
        return (F.layer_norm(x, x.shape[-1:], weight, bias, EPS),)

    def finished(self, grads: Tensors, layer_inputs: Inputs) -> Tensors:
        return grads[0] + layer_inputs["residual"], *grads[1:]

    def _saved(self, inputs: Inputs) -> Tensors:
        """Mean and 1 / deviation as torch keeps them: in the dtype of x on a CPU, in float32 on a GPU."""
        _, mean, rstd = torch.native_layer_norm(inputs["x"], inputs["x"].shape[-1:], None, None, EPS)
        return mean.squeeze(-1), rstd.squeeze(-1)

    def batched(self, inputs: Inputs, mode: str) -> Call:
        mean, rstd = self._saved(inputs)
        x, weight, bias, grad, residual = inputs.values()

        def call() -> Tensors:
            dx, sums = ops.norm_backward_add(grad, x, mean, rstd, weight, residual)
            into = torch.empty_like(weight), torch.empty_like(bias)
            ops.norm_weight_grads(grad, sums, x, mean, rstd, *into)
            return dx, *into

        return call

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.ln_backward import ln_backward_add

        mean, rstd = (t.float() for t in self._saved(inputs))
        return lambda: ln_backward_add(inputs["grad"], inputs["x"], mean, rstd, inputs["weight"], inputs["residual"])

    def flops(self, shape: Shape, mode: str) -> float:
        return 12.0 * shape.j * shape.m * shape.d

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        from ..kernels.ln_backward import configs

        return configs(shape.d, shape.m, shape.j)


class Average(Operation):
    """Prolongation of all parameters of J blocks; M does not matter."""

    name = op = "average"
    DELTA = 0.25

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        from ..nn.settings import BlockSettings

        r = Random(shape, device)
        sizes = BlockSettings(shape.d, shape.heads, shape.ffn).shapes().present()
        return {
            "fine": [r.parameter(*size, scale=1.0) for size in sizes],
            "coarse": [r.normal(*size) for size in sizes],
        }

    def plain(self, layer_inputs: Inputs) -> Tensors:
        torch._foreach_lerp_(layer_inputs["fine"], layer_inputs["coarse"], self.DELTA)
        return tuple(layer_inputs["fine"])

    def batched(self, inputs: Inputs, mode: str) -> Call:
        return lambda: self.plain(inputs)

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.average import average_

        # The stack behind the strided views, as the multilevel cycle holds it.
        stacked = [
            t.as_strided((2 * len(t) - 1, *t.shape[1:]), (t.stride(0) // 2, *t.stride()[1:])) for t in inputs["fine"]
        ]

        def call() -> Tensors:
            average_(stacked, inputs["coarse"], slice(0, None, 2), self.DELTA)
            return tuple(inputs["fine"])

        return call

    def flops(self, shape: Shape, mode: str) -> float:
        return 3.0 * shape.j * (12 * shape.d**2 + 13 * shape.d)

    def key(self, shape: Shape, mode: str) -> Key:
        return Key(self.op, shape.d, 4 * shape.d, shape.j)

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        from ..kernels.average import configs

        return configs()
