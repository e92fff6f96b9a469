"""A tagger: an encoder on words that are known by themselves and by their parts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .encoder import encoder_blocks, normal_


class Tagger(nn.Module):
    """Logits of the labels of words, [batch, sequence, features] int64 -> [batch, sequence, labels].

    A word is the sum of the embeddings of its features (see :mod:`mlpint.data.words`), so that one never seen is known
    by its ending; then each word is mixed with its neighbours (a convolution), since what labels a word is nearby and
    position embeddings need more text than treebanks have to learn what "next to" is.

    Args:
        features: number of different features; feature 0 is none, and counts nothing.
        labels: number of labels.
        sequence: longest sentence.
        layers, dim, heads, ffn, dropout: of the blocks; ``ffn`` 0 is 4 dim.
    """

    def __init__(
        self,
        features: int,
        labels: int,
        sequence: int,
        layers: int,
        dim: int,
        heads: int,
        ffn: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.features = nn.EmbeddingBag(features, dim, mode="sum", padding_idx=0)
        self.word_norm = nn.LayerNorm(dim)
        self.neighbours = nn.Conv1d(dim, dim, 3, padding=1)
        self.positions = nn.Embedding(sequence, dim)
        self.embedding_norm = nn.LayerNorm(dim)
        self.blocks = encoder_blocks(layers, dim, heads, ffn, dropout)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, labels)
        normal_(self.features, self.positions, self.head)
        with torch.no_grad():
            self.features.weight[0] = 0

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        batch, sequence, _ = features.shape
        places = torch.arange(sequence, device=features.device)
        words = self.word_norm(self.features(features.flatten(0, 1)).view(batch, sequence, -1))
        words = self._drop(words) * (places < lengths.unsqueeze(1)).unsqueeze(-1)  # padding is nobody's neighbour
        x = words + self.neighbours(words.transpose(1, 2)).transpose(1, 2) + self.positions(places)
        x = self._drop(self.embedding_norm(x))
        return self.head(self._drop(self.norm(self.blocks(x, lengths=lengths))))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
