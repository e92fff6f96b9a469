"""The stack of pre-LN blocks that all models have, and how their parameters start."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...nn import Block, DecoderBlock, EncoderBlock
from .shape import Shape


class Blocks(nn.ModuleList):
    """Layers run one after the other, each given the same further arguments."""

    def forward(self, x: Any, lengths: torch.Tensor | None = None) -> Any:
        for block in self:
            x = block(x, lengths=lengths)
        return x


def decoder_blocks(shape: Shape) -> Blocks:
    """Pre-LN blocks with causal attention, GPT-2's or Llama's, and GPT-2's initialisation."""
    return Blocks(_blocks(shape, shape.layers, attention="causal"))


def encoder_blocks(shape: Shape) -> Blocks:
    """Pre-LN blocks with full attention, which start with :func:`initial_deviation` at their width."""
    return Blocks(_widened(_blocks(shape, shape.layers, attention="full")))


def encoder_decoder_blocks(shape: Shape, encoder_layers: int) -> Blocks:
    """A translator's: the encoder's, and then the decoder's with attention to it; they start as encoder blocks do.

    Projections start smaller by the root of the number of increments that their stream gets.
    """
    encoder = _blocks(shape, encoder_layers, EncoderBlock, attention="full")
    decoder = _blocks(shape, shape.layers - encoder_layers, DecoderBlock, attention="causal", cross=True)
    return Blocks(_widened([*encoder, *decoder]))


def _blocks(shape: Shape, depth: int, make: type[Block] = Block, **kind: Any) -> list[Block]:
    dim, heads, ffn = shape.dim, shape.heads, shape.ffn_width
    kind |= {"dropout": shape.dropout}
    if shape.llama:
        kind |= {"normalization": "rms", "feed_forward": "silu gated", "biases": "none", "positions": "rotary"}
        kind |= {"kv_heads": shape.kv_heads}
    return [make(dim, heads, ffn=ffn, depth=depth, **kind) for _ in range(depth)]


@torch.no_grad()
def _widened(blocks: list[Block]) -> list[Block]:
    """Blocks with GPT-2's initialisation, and now with :func:`initial_deviation` at their width."""
    for block in blocks:
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.mul_(initial_deviation(block.settings.dim) / initial_deviation(768))
    return blocks


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
