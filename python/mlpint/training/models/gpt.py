"""A GPT: pre-LN blocks on token and position embeddings (Radford et al., 2019), or Llama's on tokens alone."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import decoder_blocks, normal_
from .shape import Shape


class GPT(nn.Module):
    """Next-token logits, [batch, sequence] int64 -> [batch, sequence, vocabulary].

    ``blocks`` may be replaced by ``LayerParallel(model.blocks, ...)``.

    Args:
        vocabulary: number of tokens.
        sequence: longest input, where positions are embedded.
        shape: of the blocks.
        tied: use the token embedding as the output matrix.
    """

    def __init__(self, vocabulary: int, sequence: int, shape: Shape, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, shape.dim)
        self.positions = None if shape.llama else nn.Embedding(sequence, shape.dim)  # Llama's are in its attention
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = decoder_blocks(shape)
        self.norm: nn.Module = nn.RMSNorm(shape.dim, 1e-5) if shape.llama else nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, vocabulary, bias=False)
        normal_(*(m for m in (self.tokens, self.positions, self.head) if m is not None))
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits(self.states(tokens))

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the logits are made of, [batch, sequence, dim]."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.blocks(self.dropout(x))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of any number of states, [..., dim] -> [..., vocabulary]."""
        return self.head(self.norm(states))
