"""The case of a whole block: x + h F(x); see cases.py."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional as F

from ..nn.batch_arguments import BatchArguments
from ..nn.block import batched_steps
from ..nn.settings import BlockSettings, Weights
from ..nn.step_context import StepContext
from .attention import plain_attention
from .cases import BACKWARD, FORWARD, FULL, Case, Inputs, Random, Tensors
from .shapes import Shape
from .timing import Call

_FIELDS = Weights._fields[:12]  # of a block like GPT-2's


class BlockCase(Case):
    """J pre-LN transformer blocks on J batches."""

    name, modes, masked = "block", (FORWARD, BACKWARD, FULL), True
    wanted: ClassVar[tuple[str, ...]] = ("x", *_FIELDS)
    operations: ClassVar[tuple[str, ...]] = (
        "ln_linear",
        "attention",
        "linear_axpy_projection",
        "linear_axpy",
        "mlp",
    )  # cases of its parts

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        d, f = shape.d, shape.ffn
        weights = Weights(
            *r.norm(d), *r.linear(3 * d, d), *r.linear(d, d), *r.norm(d), *r.linear(f, d), *r.linear(d, f)
        )
        return {
            "x": r.normal(shape.batch, shape.sequence, d),
            "grad": r.normal(shape.batch, shape.sequence, d),
            **dict(zip(_FIELDS, weights, strict=False)),
            "lengths": r.lengths() if shape.mask == "padded" else None,
            "causal": shape.mask == "causal",
            "heads": shape.heads,
            "h": 1.0,
        }

    def plain(self, layer_inputs: Inputs) -> Tensors:
        x, h = layer_inputs["x"], layer_inputs["h"]
        w = Weights(*(layer_inputs[name] for name in _FIELDS))
        b, t, d = x.shape
        n = F.layer_norm(x, (d,), w.ln1_weight, w.ln1_bias)
        qkv = F.linear(n, w.qkv_weight, w.qkv_bias)
        q, k, v = qkv.view(b, t, 3, layer_inputs["heads"], -1).permute(2, 0, 3, 1, 4)
        o = plain_attention(q, k, v, layer_inputs["causal"], layer_inputs["lengths"]).transpose(1, 2).reshape(b, t, d)
        y = x + F.linear(o, w.proj_weight, w.proj_bias)
        n = F.layer_norm(y, (d,), w.ln2_weight, w.ln2_bias)
        a = F.gelu(F.linear(n, w.up_weight, w.up_bias), approximate="tanh")
        out = y + F.linear(a, w.down_weight, w.down_bias)
        return (out if h == 1 else torch.lerp(x, out, h),)

    def settings(self, inputs: Inputs) -> BlockSettings:
        """What :mod:`mlpint.nn` calls such a block."""
        d, ffn = inputs["x"].shape[-1], inputs["up_bias"].shape[-1]
        return BlockSettings(d, inputs["heads"], ffn, "causal" if inputs["causal"] else "full")

    def batched(self, inputs: Inputs, mode: str) -> Call:
        """mlpint.nn's step; dispatch says which path its operations take."""
        j, b, t, d = inputs["x"].shape
        lengths, settings = inputs["lengths"], self.settings(inputs)
        step = batched_steps(settings)
        arguments = BatchArguments(None if lengths is None else lengths[0])
        context = StepContext(settings, arguments.attending(settings, [0], b, t), None, inputs["h"])
        w = Weights(*(inputs.get(name) for name in Weights._fields))
        x, grad = (inputs[name].view(j, b * t, d) for name in ("x", "grad"))
        if mode == FORWARD:
            return lambda: (step.forward(context, w, x).view(j, b, t, d),)

        def backward(saved: Tensors) -> Tensors:
            dx, inner = step.input_vjp(context, w, saved, grad)
            into = w.map(torch.empty_like)
            step.weight_vjp(context, w, saved, inner, into)
            return dx.view(j, b, t, d), *into.present()

        if mode == FULL:
            return lambda: backward(step.forward_train(context, w, x)[1])
        saved = step.forward_train(context, w, x)[1]
        return lambda: backward(saved)

    kernel = batched

    def flops(self, shape: Shape, mode: str) -> float:
        m, d = shape.m, shape.d
        products = 2.0 * m * (4 * d**2 + 2 * d * shape.ffn)
        attended = 4.0 * m * shape.sequence * d * (0.5 if shape.mask == "causal" else 1.0)
        times = {FORWARD: (1.0, 1.0), BACKWARD: (2.0, 2.5), FULL: (3.0, 3.5)}[mode]
        return shape.j * (products * times[0] + attended * times[1])
