"""The order in which examples are taken: a function of the seed and a position."""

from __future__ import annotations

import functools

import numpy as np

from ..errors import DataError


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

    def __init__(self, count: int, batch: int, seed: int, shard: int = 0, shards: int = 1) -> None:
        if count < batch * shards:
            of = f" on {shards} data shards" if shards > 1 else ""
            raise DataError(f"{count} examples to train on are too few for batch = {batch}{of}; give a smaller --batch")
        self.count, self.batch, self.seed, self.shard, self.shards = count, batch, seed, shard, shards
        self.per_epoch = count // (batch * shards)
        self._permutation = functools.lru_cache(maxsize=2)(self._draw)

    def __call__(self, position: int) -> np.ndarray:
        """The examples of batch ``position``, [batch] int64."""
        epoch, within = divmod(position, self.per_epoch)
        start = (within * self.shards + self.shard) * self.batch
        return self._permutation(epoch)[start : start + self.batch]

    def _draw(self, epoch: int) -> np.ndarray:
        # Counter-based (Philox, Salmon et al., SC 2011): no state to save or to share.
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch])).permutation(self.count)


def spread(count: int, batch: int, index: int, batches: int) -> np.ndarray:
    """Batch ``index`` of ``batches`` that spread evenly over ``count`` examples, none of them twice, [<= batch] int64.

    With at least count / batch batches they have all examples in them.
    """
    taken = min(count, batch * batches)
    of_all = (np.arange(taken) * count) // taken
    return of_all[index * batch : (index + 1) * batch]
