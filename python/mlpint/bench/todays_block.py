"""The case of a block like Llama's; see cases.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..nn.settings import BlockSettings
from .attention import plain_attention
from .block import BlockCase
from .cases import BACKWARD, FORWARD, FULL, Inputs, Random, Tensors
from .shapes import Shape

_FIELDS = ("ln1_weight", "qkv_weight", "proj_weight", "ln2_weight", "up_weight", "down_weight")
_THETA = 10000.0


class LlamaBlockCase(BlockCase):
    """J blocks with RMSNorm, rotary positions, half as many key heads as query heads, SwiGLU and no biases."""

    name = "llama_block"
    wanted = ("x", *_FIELDS)
    operations = ("rms_linear", "pack_heads", "attention", "linear_axpy_projection", "gated_linear", "linear_axpy")

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        d, f, heads = shape.d, shape.ffn, shape.heads
        wide = d + 2 * max(1, heads // 2) * (d // heads)
        sizes = {"qkv_weight": (wide, d), "proj_weight": (d, d), "up_weight": (2 * f, d), "down_weight": (d, f)}
        weights = {name: r.linear(*sizes[name])[0] if name in sizes else r.norm(d)[0] for name in _FIELDS}
        return {
            "x": r.normal(shape.batch, shape.sequence, d),
            "grad": r.normal(shape.batch, shape.sequence, d),
            **weights,
            "lengths": r.lengths() if shape.mask == "padded" else None,
            "causal": shape.mask == "causal",
            "heads": heads,
            "h": 1.0,
        }

    def settings(self, inputs: Inputs) -> BlockSettings:
        d, heads = inputs["x"].shape[-1], inputs["heads"]
        return BlockSettings(
            d,
            heads,
            inputs["down_weight"].shape[-1],
            "causal" if inputs["causal"] else "full",
            normalization="rms",
            feed_forward="silu gated",
            biases="none",
            positions="rotary",
            rope_theta=_THETA,
            kv_heads=max(1, heads // 2),
        )

    def plain(self, layer_inputs: Inputs) -> Tensors:
        x, h, heads = layer_inputs["x"], layer_inputs["h"], layer_inputs["heads"]
        b, t, d = x.shape
        keys, width = max(1, heads // 2), d // heads
        half = torch.arange(width // 2, device=x.device, dtype=torch.float64)
        angles = torch.outer(torch.arange(t, device=x.device, dtype=torch.float64), _THETA ** -(2 * half / width))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        def turned(part: torch.Tensor) -> torch.Tensor:
            u, v = part.chunk(2, -1)
            return torch.cat([u * cos - v * sin, v * cos + u * sin], -1)

        n = F.rms_norm(x, (d,), layer_inputs["ln1_weight"], 1e-5)
        qkv = F.linear(n, layer_inputs["qkv_weight"]).view(b, t, -1, width).transpose(1, 2)
        q, k, v = qkv.split([heads, keys, keys], 1)
        k, v = (part.repeat_interleave(heads // keys, 1) for part in (turned(k), v))
        o = plain_attention(turned(q), k, v, layer_inputs["causal"], layer_inputs["lengths"])
        y = x + F.linear(o.transpose(1, 2).reshape(b, t, d), layer_inputs["proj_weight"])
        n = F.rms_norm(y, (d,), layer_inputs["ln2_weight"], 1e-5)
        gate, up = F.linear(n, layer_inputs["up_weight"]).chunk(2, -1)
        out = y + F.linear(F.silu(gate) * up, layer_inputs["down_weight"])
        return (out if h == 1 else torch.lerp(x, out, h),)

    def flops(self, shape: Shape, mode: str) -> float:
        m, d = shape.m, shape.d
        keys = max(1, shape.heads // 2) / shape.heads
        products = 2.0 * m * ((2 + 2 * keys) * d**2 + 3 * d * shape.ffn)
        attended = 4.0 * m * shape.sequence * d * (0.5 if shape.mask == "causal" else 1.0)
        times = {FORWARD: (1.0, 1.0), BACKWARD: (2.0, 2.5), FULL: (3.0, 3.5)}[mode]
        return shape.j * (products * times[0] + attended * times[1])
