"""A BERT: an encoder on token and position embeddings that names masked tokens (Devlin et al., 2019)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import encoder_blocks, normal_, start_positions_
from .shape import Shape


class BERTEncoder(nn.Module):
    """A BERT without a head: what is pre-trained for other tasks.

    Pre-LN blocks, as arXiv 2601.09026 has them, where the original's are post-LN. ``blocks`` may be replaced by
    ``LayerParallel(model.blocks, ...)``. A model that derives from it draws the token embedding with its head.

    Args:
        vocabulary: number of tokens, special ones included.
        sequence: longest input.
        shape: of the blocks.
    """

    def __init__(self, vocabulary: int, sequence: int, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, shape.dim), nn.Embedding(sequence, shape.dim)
        # Embeddings of unit size: next to smaller ones the first blocks' steps are large, and MGRIT's error with them.
        self.embedding_norm = nn.LayerNorm(shape.dim)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = encoder_blocks(shape)
        self.norm = nn.LayerNorm(shape.dim)
        start_positions_(self.positions.weight)

    def encode(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The states behind the last block, normalised: [batch, sequence, dim].

        ``lengths`` are those of :class:`mlpint.nn.Block`.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding_norm(self.tokens(tokens) + self.positions(places))
        return self.norm(self.blocks(self.dropout(x), lengths=lengths))


class BERT(BERTEncoder):
    """Logits of the tokens that stand, or stood, at some places: [batch, sequence] int64 -> [batch, n, vocabulary].

    Args:
        vocabulary, sequence, shape: as in :class:`BERTEncoder`.
        tied: use the token embedding as the output matrix.
    """

    def __init__(self, vocabulary: int, sequence: int, shape: Shape, tied: bool = True) -> None:
        super().__init__(vocabulary, sequence, shape)
        self.transform, self.transform_norm = nn.Linear(shape.dim, shape.dim), nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, vocabulary)
        normal_(self.tokens, self.head)
        nn.init.normal_(self.transform.weight, std=1 / math.sqrt(shape.dim))
        nn.init.zeros_(self.transform.bias)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(
        self, tokens: torch.Tensor, places: torch.Tensor | None = None, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits at ``places``, [batch, n] int64, of each sequence; at all of them by default."""
        return self.logits(self.states(tokens, places, lengths))

    def states(
        self, tokens: torch.Tensor, places: torch.Tensor | None = None, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the logits are made of, [batch, n, dim]."""
        x = self.encode(tokens, lengths)
        return x if places is None else x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of any number of states, [..., dim] -> [..., vocabulary]."""
        return self.head(self.transform_norm(F.gelu(self.transform(states), approximate="tanh")))
