"""Batches as a function of the seed and a position, so that every rank draws the same and a run can go on anywhere."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import DataError
from .corpus import Corpus


class Batches:
    """Sequences of a corpus with the tokens that follow them.

    Args:
        corpus: where they are taken from.
        sequence: tokens per sequence.
        batch: sequences per batch.
        seed: of the order.
        device: where the batches are put.
    """

    def __init__(
        self, corpus: Corpus, sequence: int, batch: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.corpus, self.sequence, self.batch, self.seed, self.device = corpus, sequence, batch, seed, device

    def train(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number ``position``: inputs and targets, both [batch, sequence] int64, at random places of the text.

        The places come from a counter-based generator (Philox, Salmon et al., SC 2011): no state to save or to share.
        """
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, position]))
        starts = generator.integers(len(self.corpus.train) - self.sequence, size=self.batch)
        return self._cut(self.corpus.train, starts)

    def validation(self, index: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch ``index`` of ``count`` that spread evenly over the held-out text, always at the same places."""
        last = len(self.corpus.validation) - self.sequence - 1
        starts = np.linspace(0, last, count * self.batch).astype(np.int64).reshape(count, self.batch)
        return self._cut(self.corpus.validation, starts[index])

    def _cut(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        windows = np.stack([tokens[start : start + self.sequence + 1] for start in starts]).astype(np.int64)
        if windows.max() >= self.corpus.vocabulary:
            raise DataError(
                f"{self.corpus.name}: token {windows.max()} is outside the vocabulary of {self.corpus.vocabulary}; "
                "give a larger --vocabulary"
            )
        pairs = torch.from_numpy(windows).to(self.device)
        return pairs[:, :-1], pairs[:, 1:]
