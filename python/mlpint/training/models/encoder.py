"""What the encoders have in common: pre-LN blocks in which every place attends to every other."""

from __future__ import annotations

import math

import torch
from torch import nn

from ...nn import Block


class Blocks(nn.ModuleList):
    """Layers run one after the other, each given the same further arguments."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        for block in self:
            x = block(x, lengths=lengths)
        return x


def encoder_blocks(layers: int, dim: int, heads: int, ffn: int, dropout: float) -> Blocks:
    """Pre-LN blocks with full attention; ``ffn`` 0 is 4 dim.

    The initialisation is GPT-2's at its width, 768, and larger by sqrt(768 / dim) at others, so that what a linear map
    makes of a normalised state is of the same size: narrow blocks that start with GPT-2's numbers do next to nothing
    for long.
    """
    settings = {"ffn": ffn or 4 * dim, "attention": "full", "dropout": dropout, "depth": layers}
    blocks = Blocks(Block(dim, heads, **settings) for _ in range(layers))
    with torch.no_grad():
        for block in blocks:
            for linear in (block.qkv, block.proj, block.up, block.down):
                linear.weight.mul_(math.sqrt(768 / dim))
    return blocks


def normal_(*modules: nn.Module) -> None:
    """GPT-2's initialisation of embeddings and linear maps: normal with deviation 0.02, biases 0."""
    for module in modules:
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


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
