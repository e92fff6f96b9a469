"""A GPT: pre-LN transformer blocks on token and position embeddings (Radford et al., 2019)."""

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
        sequence: longest input.
        shape: of the blocks.
        tied: use the token embedding as the output matrix.
    """

    def __init__(self, vocabulary: int, sequence: int, shape: Shape, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, shape.dim), nn.Embedding(sequence, shape.dim)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = decoder_blocks(shape)
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, vocabulary, bias=False)
        normal_(self.tokens, self.positions, self.head)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits(self.states(tokens))

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the logits are made of, [batch, sequence, dim]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.blocks(self.dropout(self.tokens(tokens) + self.positions(places)))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of any number of states, [..., dim] -> [..., vocabulary]."""
        return self.head(self.norm(states))
