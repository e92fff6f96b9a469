"""The order in which examples are taken: a function of the seed and a position."""

from __future__ import annotations

import functools

import numpy as np

from ...errors import DataError


def draws(seed: int, position: int, stream: int = 0) -> np.random.Generator:
    """Random numbers that depend on these alone: no state to save or to share.

    From a counter-based generator (Philox, Salmon et al., SC 2011). Streams keep apart what is drawn for one position.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, position]))


class Order:
    """Examples in batches: each once an epoch, every epoch in another order.

    An epoch drops what is left over when its batches are full. Data-parallel groups take different examples: batch
    ``p`` of shard i and of shard j have none in common.

    Args:
        count: number of examples.
        batch: examples per batch and shard.
        seed: of the order.
        shard, shards: the part of each batch that is wanted, of how many.

    Raises:
        DataError: too few examples for one batch.
    """

    things = "examples"

    def __init__(self, count: int, batch: int, seed: int, shard: int = 0, shards: int = 1) -> None:
        if count < batch * shards:
            of = f" on {shards} data shards" if shards > 1 else ""
            few = f"{count} {self.things} to train on are too few for batch = {batch}{of}"
            raise DataError(f"{few}; give a smaller --batch")
        self.count, self.batch, self.seed, self.shard, self.shards = count, batch, seed, shard, shards
        self.per_epoch = count // (batch * shards)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    def __call__(self, position: int) -> np.ndarray:
        """The examples of batch ``position``, [batch] int64."""
        epoch, within = divmod(position, self.per_epoch)
        return self._epoch(epoch)[within * self.shards + self.shard]

    def _draw(self, epoch: int) -> np.ndarray:
        """The batches of an epoch, [per_epoch x shards, batch]."""
        order = draws(self.seed, epoch).permutation(self.count)
        return order[: self.per_epoch * self.shards * self.batch].reshape(-1, self.batch)


def spread(count: int, batch: int, index: int, batches: int) -> np.ndarray:
    """Batch ``index`` of ``batches`` that spread evenly over ``count`` examples, none of them twice, [<= batch] int64.

    With at least count / batch batches they have all examples in them.
    """
    taken = min(count, batch * batches)
    of_all = (np.arange(taken) * count) // taken
    return of_all[index * batch : (index + 1) * batch]
