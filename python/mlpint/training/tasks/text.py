"""What tasks on plain text have in common: the corpus, its batches and what ranks and checkpoints know it by."""

from __future__ import annotations

from ...comm.fingerprint import crc
from ..config import TrainConfig
from ..data import Batches, load
from .base import Task


class TextTask(Task):
    """A task on the tokens of a text."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        data = config.data
        self.corpus = load(data.data, data.sequence, config.model.vocabulary, data.validation, data.tokenizer)
        self.corpus.check_samples()
        self.name, self.subwords = self.corpus.name, self.corpus.subwords
        self.batches = Batches(self.corpus, data.sequence, data.batch, config.run.seed)
        self.per_batch = data.batch * data.sequence
        self.held_out_batches = max(1, (len(self.corpus.validation) - 1) // self.per_batch)

    def describe(self) -> str:
        return f"{self.name}: {len(self.corpus.train):,} tokens, {len(self.corpus.validation):,} held out"

    def digest(self) -> str:
        """The text's length and a digest of both of its ends."""
        train, validation = self.corpus.train, self.corpus.validation
        ends = [part.tobytes() for tokens in (train, validation) for part in (tokens[:65536], tokens[-65536:])]
        return f"{len(train)} + {len(validation)} tokens, digest {crc(*ends)}"

    def identity(self) -> dict[str, str]:
        return {"vocabulary": self.corpus.identity}
