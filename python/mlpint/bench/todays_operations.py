"""The cases of operations that today's language models have beside GPT-2's; see cases.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..nn import ops
from ..nn.heads import packed, packed_backward
from ..nn.settings import BlockSettings, Weights
from ..nn.step_context import StepContext
from .cases import BACKWARD, FORWARD, Inputs, Key, Operation, Random, Tensors
from .operations import EPS, LnLinear
from .shapes import Shape
from .timing import Call

_NO_WEIGHTS: Weights = Weights(*[None] * 12)


class RmsLinear(LnLinear):
    """RMSNorm and the projection to queries, keys and values, without biases: the kernel of ``ln_linear``."""

    name = "rms_linear"

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        (ln_weight, _), (weight, _) = r.norm(shape.d), r.linear(3 * shape.d, shape.d)
        return {"x": r.normal(shape.m, shape.d), "ln_weight": ln_weight, "w": weight}

    def plain(self, layer_inputs: Inputs) -> Tensors:
        x, ln_weight, weight = layer_inputs.values()
        return (F.linear(F.rms_norm(x, x.shape[-1:], ln_weight, EPS), weight),)

    def batched(self, inputs: Inputs, mode: str) -> Call:
        x, ln_weight, weight = inputs.values()
        return lambda: (ops.ln_linear(x, ln_weight, None, weight, None, EPS, "none"),)

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.ln_linear import ln_linear

        x, ln_weight, weight = inputs.values()
        return lambda: (ln_linear(x, ln_weight, None, weight, None, EPS, "none"),)

    def flops(self, shape: Shape, mode: str) -> float:
        return 6.0 * shape.j * shape.m * shape.d**2


class GatedLinear(Operation):
    """RMSNorm and the way up of SwiGLU."""

    name = op = "gated_linear"

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        (ln_weight, _), (weight, _) = r.norm(shape.d), r.linear(2 * shape.ffn, shape.d)
        return {"x": r.normal(shape.m, shape.d), "ln_weight": ln_weight, "w": weight}

    def plain(self, layer_inputs: Inputs) -> Tensors:
        x, ln_weight, weight = layer_inputs.values()
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], ln_weight, EPS), weight).chunk(2, -1)
        return (F.silu(gate) * up,)

    def batched(self, inputs: Inputs, mode: str) -> Call:
        x, ln_weight, weight = inputs.values()
        return lambda: (ops.gated_linear(x, ln_weight, None, weight, None, EPS, "silu"),)

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.gated_linear import gated_linear

        x, ln_weight, weight = inputs.values()
        return lambda: (gated_linear(x, ln_weight, None, weight, None, EPS, "silu"),)

    def flops(self, shape: Shape, mode: str) -> float:
        return 4.0 * shape.j * shape.m * shape.d * shape.ffn

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        from ..kernels.gated_linear import configs

        return configs(shape.d, shape.dtype)


class GatedBackward(Operation):
    """The gradient for both halves of a gate."""

    name, op, modes = "gated_backward", "gated_backward", (BACKWARD,)
    wanted = ("pre",)

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        return {"pre": r.normal(shape.m, 2 * shape.ffn), "grad": r.normal(shape.m, shape.ffn)}

    def plain(self, layer_inputs: Inputs) -> Tensors:
        gate, up = layer_inputs["pre"].chunk(2, -1)
        return (F.silu(gate) * up,)

    def batched(self, inputs: Inputs, mode: str) -> Call:
        return lambda: (ops.gate_backward(inputs["grad"], inputs["pre"], "silu"),)

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.gated_backward import gated_backward

        return lambda: (gated_backward(inputs["grad"], inputs["pre"], "silu"),)

    def flops(self, shape: Shape, mode: str) -> float:
        return 10.0 * shape.j * shape.m * shape.ffn

    def key(self, shape: Shape, mode: str) -> Key:
        return Key(self.op, shape.ffn, shape.m, shape.j)

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        from ..kernels.gated_backward import configs

        return configs(shape.ffn)


class PackHeads(Operation):
    """Rotary positions and grouped queries on the way into attention, half as many key heads as query heads."""

    name, op, modes = "pack_heads", "pack_heads", (FORWARD, BACKWARD)
    wanted = ("qkv",)

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r, heads, keys = Random(shape, device), shape.heads, max(1, shape.heads // 2)
        width = shape.d // heads
        angles = torch.outer(torch.arange(shape.sequence), 1e4 ** -(torch.arange(width // 2) / (width // 2)))
        return {
            "qkv": r.normal(shape.m, (heads + 2 * keys) * width),
            "grad": r.normal(shape.m, 3 * heads * width),
            # For every layer alike, but layers are handed out one by one.
            **{name: t.to(device, shape.dtype).expand(shape.j, -1, -1) for name, t in _turns(angles).items()},
            "heads": (heads, keys, width),
        }

    def plain(self, layer_inputs: Inputs) -> Tensors:
        heads, keys, width = layer_inputs["heads"]
        cos, sin = (layer_inputs[name][:, None] for name in ("cos", "sin"))
        split = layer_inputs["qkv"].view(-1, len(cos), heads + 2 * keys, width).split([heads, keys, keys], 2)

        def turned(t: torch.Tensor) -> torch.Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        k, v = (t.repeat_interleave(heads // keys, 2) for t in (turned(split[1]), split[2]))
        return (torch.cat([turned(split[0]), k, v], 2).reshape(len(layer_inputs["qkv"]), -1),)

    def _context(self, inputs: Inputs) -> StepContext:
        heads, keys, width = inputs["heads"]
        qkv, cos = inputs["qkv"], inputs["cos"]
        settings = BlockSettings(
            heads * width, heads, 1, kv_heads=keys, head_width=width, positions="rotary", normalization="rms"
        )
        context = StepContext.plain(settings, qkv.shape[1] // cos.shape[1], cos.shape[1])
        context.rotation = cos[:1], inputs["sin"][:1]
        return context

    def batched(self, inputs: Inputs, mode: str) -> Call:
        context, qkv, grad = self._context(inputs), inputs["qkv"], inputs["grad"]
        none = qkv.new_empty(len(qkv), 0)
        if mode == FORWARD:
            return lambda: (packed(context, _NO_WEIGHTS, qkv)[0],)
        return lambda: (packed_backward(context, _NO_WEIGHTS, grad, qkv, none, none)[0],)

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.pack_heads import pack_heads, pack_heads_backward

        heads, keys, _ = inputs["heads"]
        tables = inputs["cos"][0], inputs["sin"][0]
        if mode == FORWARD:
            return lambda: (pack_heads(inputs["qkv"], heads, keys, None, None, *tables)[0],)
        return lambda: (pack_heads_backward(inputs["grad"], heads, keys, *tables),)

    def flops(self, shape: Shape, mode: str) -> float:
        return 6.0 * shape.j * shape.m * shape.d

    def key(self, shape: Shape, mode: str) -> Key:
        return Key(self.op, shape.d // shape.heads, shape.m, shape.j)

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        from ..kernels.pack_heads import configs

        return configs(shape.d // shape.heads)


def _turns(angles: torch.Tensor) -> Inputs:
    return {"cos": angles.cos(), "sin": angles.sin()}
