"""The case of softmax attention; see cases.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..nn import attention as attn
from ..nn.attending import Attending, Padding
from .cases import BACKWARD, FORWARD, FULL, Inputs, Key, Operation, Random, Tensors
from .shapes import Shape
from .timing import Call


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, lengths: torch.Tensor | None
) -> torch.Tensor:
    """[B, H, T, hd]; padded keys are masked, padded queries give 0."""
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    inside = torch.arange(q.shape[2], device=q.device) < lengths[:, None]  # [B, T]
    mask = inside[:, None, None, :]
    if causal:
        mask = mask & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) * inside[:, None, :, None].to(q.dtype)


class Attention(Operation):
    """Attention on strided views of QKV's output."""

    name, op, modes, masked = "attention", "attention", (FORWARD, BACKWARD, FULL), True
    wanted = ("qkv",)

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        r = Random(shape, device)
        return {
            "qkv": r.normal(shape.m, 3 * shape.d),
            "grad": r.normal(shape.m, shape.d),
            "lengths": r.lengths() if shape.mask == "padded" else None,
            "causal": shape.mask == "causal",
            "heads": shape.heads,
            "batch": shape.batch,
        }

    def plain(self, layer_inputs: Inputs) -> Tensors:
        m, width = layer_inputs["qkv"].shape
        batch, heads = layer_inputs["batch"], layer_inputs["heads"]
        q, k, v = layer_inputs["qkv"].view(batch, m // batch, 3, heads, -1).permute(2, 0, 3, 1, 4)
        o = plain_attention(q, k, v, layer_inputs["causal"], layer_inputs["lengths"])
        return (o.transpose(1, 2).reshape(m, width // 3),)

    def _attending(self, inputs: Inputs) -> Attending:
        qkv, lengths, batch, heads = (inputs[name] for name in ("qkv", "lengths", "batch", "heads"))
        padding = None if lengths is None else Padding(lengths[0], qkv.shape[1] // batch)
        return Attending(batch, heads, inputs["causal"], (qkv.shape[-1] // 3 // heads) ** -0.5, padding)

    def batched(self, inputs: Inputs, mode: str) -> Call:
        qkv, grad, to = inputs["qkv"], inputs["grad"], self._attending(inputs)
        if mode == FORWARD:
            return lambda: (attn.attention(qkv, to),)

        def backward(o: torch.Tensor, saved: torch.Tensor) -> Tensors:
            return (attn.attention_backward(grad, qkv, o, saved, to),)

        if mode == FULL:
            return lambda: backward(*attn.attention_train(qkv, to))
        outputs = attn.attention_train(qkv, to)
        return lambda: backward(*outputs)

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        from ..kernels.attention import attention, attention_train
        from ..kernels.attention_backward import attention_backward

        qkv = inputs["qkv"]
        to, lengths = self._attending(inputs), inputs["lengths"]
        batch, heads, causal, scale = to.batch, to.heads, to.causal, to.scale
        j, m, width = qkv.shape

        def heads_of(t: torch.Tensor) -> torch.Tensor:
            """[J, B, H, T, hd] views of [J, B T, parts x D]."""
            return t.view(j, batch, m // batch, -1, heads, width // 3 // heads).permute(3, 0, 1, 4, 2, 5)

        q, k, v = heads_of(qkv)
        (grad,) = heads_of(inputs["grad"])

        def merged(o: torch.Tensor) -> torch.Tensor:
            return o.transpose(2, 3).reshape(j, m, width // 3)

        if mode == FORWARD:
            return lambda: (merged(attention(q, k, v, causal, lengths, scale)),)

        def backward(o: torch.Tensor, lse: torch.Tensor) -> Tensors:
            gradients = attention_backward(grad, q, k, v, o, lse, causal, lengths, scale)
            return (torch.cat([merged(t) for t in gradients], -1),)

        if mode == FULL:
            return lambda: backward(*attention_train(q, k, v, causal, lengths, scale))
        saved = attention_train(q, k, v, causal, lengths, scale)
        return lambda: backward(*saved)

    def flops(self, shape: Shape, mode: str) -> float:
        forward = 4.0 * shape.j * shape.m * shape.sequence * shape.d * (0.5 if shape.mask == "causal" else 1.0)
        return forward * {FORWARD: 1.0, BACKWARD: 2.5, FULL: 3.5}[mode]

    def key(self, shape: Shape, mode: str) -> Key:
        op = self.op if mode == FORWARD else "attention_backward"
        return Key(op, self._width(shape), shape.sequence, shape.j * shape.batch * shape.heads)

    def _width(self, shape: Shape) -> int:
        """The width of a head in the kernel's tiles."""
        return max(16, 1 << (shape.d // shape.heads - 1).bit_length())

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        if mode == FORWARD:
            from ..kernels.attention import configs
        else:
            from ..kernels.attention_backward import configs
        return configs(self._width(shape), shape.sequence, shape.dtype)
