"""Batches as a function of the seed and a position, so that every rank draws the same and a run can go on anywhere."""

from __future__ import annotations

import numpy as np
import torch

from ...errors import DataError
from .corpus import Corpus
from .order import draws


class Batches:
    """Sequences of a corpus with the tokens that follow them.

    Args:
        corpus: where they are taken from.
        sequence: tokens per sequence.
        batch: sequences per batch.
        seed: of the order.
        shard, shards: data-parallel groups train on parts of the text that do not overlap: which one of how many.

    Raises:
        DataError: too little text for so many shards.
    """

    def __init__(self, corpus: Corpus, sequence: int, batch: int, seed: int, shard: int = 0, shards: int = 1) -> None:
        self.corpus, self.sequence, self.batch, self.seed = corpus, sequence, batch, seed
        length = len(corpus.train)
        self.part = corpus.train[length * shard // shards : length * (shard + 1) // shards]
        if len(self.part) <= sequence:
            raise DataError(f"{corpus.name}: {length} tokens are too few for {shards} data shards of {sequence} each")

    def train(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number ``position``: inputs and targets, both [batch, sequence] int64, at random places of the text."""
        starts = draws(self.seed, position).integers(len(self.part) - self.sequence, size=self.batch)
        return self._cut(self.part, starts)

    def validation(self, index: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch ``index`` of ``count`` that spread evenly over the held-out text, always at the same places."""
        last = len(self.corpus.validation) - self.sequence - 1
        starts = np.linspace(0, last, count * self.batch).astype(np.int64).reshape(count, self.batch)
        return self._cut(self.corpus.validation, starts[index])

    def _cut(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        windows = np.stack([tokens[start : start + self.sequence + 1] for start in starts]).astype(np.int64)
        self.corpus.check(windows)
        pairs = torch.from_numpy(windows)
        return pairs[:, :-1], pairs[:, 1:]
