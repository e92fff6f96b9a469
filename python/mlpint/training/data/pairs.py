"""Pairs of token sequences and the batches they are taken in, of similar lengths together."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from .bpe import PAD, START
from .order import Order, draws, spread

_POOL = 64  # batches whose pairs are sorted by length; fewer: more padding, more: less chance


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences of tokens, one after the other in memory.

    Attributes:
        tokens: [sum of the lengths] unsigned integers.
        ends: [count] where each sequence ends.
    """

    tokens: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, sequences: list[list[int]]) -> Ragged:
        tokens = np.fromiter((t for sequence in sequences for t in sequence), np.uint32)
        return cls(tokens, np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def padded(self, which: np.ndarray) -> torch.Tensor:
        """Some of the sequences, [len(which), longest of them] int64."""
        rows = np.full((len(which), int(self.lengths[which].max())), PAD, np.int64)
        for row, n in zip(rows, which, strict=True):
            row[: self.lengths[n]] = self.tokens[self.ends[n] - self.lengths[n] : self.ends[n]]
        return torch.from_numpy(rows)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Source and target sequences, each with its end token."""

    source: Ragged
    target: Ragged

    def __len__(self) -> int:
        return len(self.source.ends)

    def batch(self, which: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Source tokens [B, S], their lengths [B], target tokens that a decoder is given [B, T], and those that it is
        to predict [B, T]; padded with ``PAD``."""
        wanted = self.target.padded(which)
        shifted = torch.cat([torch.full((len(which), 1), START), wanted[:, :-1]], 1)
        return self.source.padded(which), torch.from_numpy(self.source.lengths[which]), shifted, wanted

    def by_length(self) -> np.ndarray:
        """All pairs, short ones first."""
        return np.lexsort((self.source.lengths, self.target.lengths))


class Buckets(Order):
    """Pairs of similar lengths in batches; otherwise as :class:`mlpint.training.data.order.Order`.

    Args:
        pairs: to take.
        batch, seed, shard, shards: as there.
    """

    things = "pairs"

    def __init__(self, pairs: Pairs, batch: int, seed: int, shard: int = 0, shards: int = 1) -> None:
        super().__init__(len(pairs), batch, seed, shard, shards)
        self.pairs = pairs

    def _draw(self, epoch: int) -> np.ndarray:
        generator = draws(self.seed, epoch)
        count = self.per_epoch * self.shards
        order = generator.permutation(self.count)[: count * self.batch]
        target, source = self.pairs.target.lengths, self.pairs.source.lengths
        for start in range(0, len(order), _POOL * self.batch):
            pool = order[start : start + _POOL * self.batch]
            pool[:] = pool[np.lexsort((source[pool], target[pool]))]
        return order.reshape(count, self.batch)[generator.permutation(count)]


def held_out(pairs: Pairs, batch: int, index: int, count: int) -> np.ndarray:
    """Batch ``index`` of ``count`` that spread evenly over the lengths, none of the pairs twice."""
    return pairs.by_length()[spread(len(pairs), batch, index, count)]
