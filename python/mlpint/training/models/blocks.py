"""The stack of pre-LN blocks that all models but the translator have, and how their parameters start."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...nn import Block
from .shape import Shape


class Blocks(nn.ModuleList):
    """Layers run one after the other, each given the same further arguments."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        for block in self:
            x = block(x, lengths=lengths)
        return x


def decoder_blocks(shape: Shape) -> Blocks:
    """Pre-LN blocks with causal attention, GPT-2's or Llama's, and GPT-2's initialisation."""
    return Blocks(_blocks(shape, "causal"))


def encoder_blocks(shape: Shape) -> Blocks:
    """Pre-LN blocks with full attention, which start with :func:`initial_deviation` at their width."""
    blocks = _blocks(shape, "full")
    with torch.no_grad():
        for block in blocks:
            for linear in (block.qkv, block.proj, block.up, block.down):
                linear.weight.mul_(initial_deviation(shape.dim) / initial_deviation(768))
    return Blocks(blocks)


def _blocks(shape: Shape, attention: str) -> list[Block]:
    dim, heads, ffn, depth = shape.dim, shape.heads, shape.ffn_width, shape.layers
    kind: dict[str, Any] = {"attention": attention, "dropout": shape.dropout}
    if shape.llama:
        kind |= {"normalization": "rms", "feed_forward": "silu gated", "biases": "none", "positions": "rotary"}
        kind |= {"kv_heads": shape.kv_heads}
    return [Block(dim, heads, ffn=ffn, depth=depth, **kind) for _ in range(depth)]


def initial_deviation(dim: int) -> float:
    """GPT-2's 0.02 at its width, 768, and larger by sqrt(768 / dim) at others.

    So what a linear map makes of a normalised state is of the same size at any width. With GPT-2's number narrow blocks
    do next to nothing for long: at a width of 128 or less, a translator's attention is nearly uniform for hundreds of
    steps and finds no words to align.
    """
    return 0.02 * math.sqrt(768 / dim)


def normal_(*modules: nn.Embedding | nn.EmbeddingBag | nn.Linear | nn.Conv2d, std: float = 0.02) -> None:
    """GPT-2's initialisation of embeddings and linear maps: normal with its deviation unless told, biases 0."""
    for module in modules:
        nn.init.normal_(module.weight, std=std)
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)


@torch.no_grad()
def start_positions_(weight: torch.Tensor) -> None:
    """Position embeddings [sequence, dim] of deviation 0.02 that start as waves (Vaswani et al., 2017).

    They are learnt all the same, but what lies next to a place is known from the start: from random ones a small masked
    language model takes longer until it looks at context at all (150 steps instead of 100 on bytes of English).
    """
    sequence, dim = weight.shape
    places = torch.arange(sequence, device=weight.device).unsqueeze(1)
    rates = torch.exp(torch.arange(0, dim, 2, device=weight.device) * (-math.log(10000.0) / dim))
    waves = torch.stack([torch.sin(places * rates), torch.cos(places * rates)], -1).flatten(1)
    weight.copy_(0.02 * math.sqrt(2) * waves[:, :dim])
