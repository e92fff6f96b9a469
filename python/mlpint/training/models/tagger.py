"""A tagger: an encoder on words that are known by themselves and by their parts."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import encoder_blocks, normal_
from .shape import Shape


class Tagger(nn.Module):
    """Logits of the labels of words, [batch, sequence, features] int64 -> [batch, sequence, labels].

    A word is the sum of the embeddings of its features (see :mod:`mlpint.training.data.words`), so that one never seen
    is known by its ending; then each word is mixed with its neighbours (a convolution), since what labels a word is
    nearby and position embeddings need more text than treebanks have to learn what "next to" is.

    Args:
        features: number of different features; feature 0 is none, and counts nothing.
        labels: number of labels.
        sequence: longest sentence.
        shape: of the blocks.
    """

    def __init__(self, features: int, labels: int, sequence: int, shape: Shape) -> None:
        super().__init__()
        self.features = nn.EmbeddingBag(features, shape.dim, mode="sum", padding_idx=0)
        self.word_norm = nn.LayerNorm(shape.dim)
        self.neighbours = nn.Conv1d(shape.dim, shape.dim, 3, padding=1)
        self.positions = nn.Embedding(sequence, shape.dim)
        self.embedding_norm = nn.LayerNorm(shape.dim)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = encoder_blocks(shape)
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, labels)
        normal_(self.features, self.positions, self.head)
        with torch.no_grad():
            self.features.weight[0] = 0

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.logits(self.states(features, lengths))

    def states(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What the logits are made of, [batch, sequence, dim]."""
        batch, sequence, _ = features.shape
        places = torch.arange(sequence, device=features.device)
        words = self.word_norm(self.features(features.flatten(0, 1)).view(batch, sequence, -1))
        words = self.dropout(words) * (places < lengths.unsqueeze(1)).unsqueeze(-1)  # padding is nobody's neighbour
        x = words + self.neighbours(words.transpose(1, 2)).transpose(1, 2) + self.positions(places)
        x = self.dropout(self.embedding_norm(x))
        return self.dropout(self.norm(self.blocks(x, lengths=lengths)))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of any number of states, [..., dim] -> [..., labels]."""
        return self.head(states)
