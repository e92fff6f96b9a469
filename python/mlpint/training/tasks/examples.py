"""What tasks on separate examples have in common: which of them are in a batch."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np

from ..data.order import Order, spread
from .base import Task


class ExamplesTask(Task):
    """A task on images, sentences, texts: each is trained on once an epoch.

    Attributes:
        training, held_out: the examples, of a type that each task declares; to be set before :meth:`_deal`.
        order: number of a training batch -> its examples.
    """

    training: Sized
    held_out: Sized

    def _deal(self) -> None:
        """Raises a DataError if the examples are too few for a batch."""
        batch = self.config.data.batch
        self.order = Order(len(self.training), batch, self.config.run.seed)
        self.per_batch, self.held_out_batches = batch, -(-len(self.held_out) // batch)

    def _validated(self, index: int, count: int) -> np.ndarray:
        """The held-out examples in batch ``index`` of ``count``."""
        return spread(len(self.held_out), self.config.data.batch, index, count)
