"""Next-token prediction on text: GPT-2 (Radford et al., 2019)."""

from __future__ import annotations

import zlib

import torch
from torch import nn
from torch.nn import functional as F

from ..comm import Comm
from ..config import TrainConfig
from ..data import Batches, Corpus, load
from ..models import GPT
from ..sample import generate
from .base import Batch, Sample, Task


class GPTTask(Task):
    """A decoder that predicts each token from those before it."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        data = config.data
        self.corpus = load(data.data, data.sequence, config.model.vocabulary, data.validation, data.tokenizer)
        self.corpus.check_samples()
        self.name = self.corpus.name
        self.batches = Batches(self.corpus, data.sequence, data.batch, config.run.seed)
        self.per_batch = data.batch * data.sequence
        self.held_out_batches = max(1, (len(self.corpus.validation) - 1) // self.per_batch)

    def describe(self) -> str:
        return f"{self.name}: {len(self.corpus.train):,} tokens, {len(self.corpus.validation):,} held out"

    def digest(self) -> str:
        return corpus_digest(self.corpus)

    def identity(self) -> dict[str, str]:
        return {"vocabulary": self.corpus.identity}

    def model(self) -> nn.Module:
        model = self.config.model
        return GPT(
            self.corpus.vocabulary,
            self.config.data.sequence,
            model.layers,
            model.dim,
            model.heads,
            model.dropout,
            model.tied,
            model.ffn,
        )

    def train(self, position: int) -> Batch:
        return self.batches.train(position)

    def validation_batches(self, wanted: int) -> int:
        return wanted or self.held_out_batches  # more than that overlap

    def validation(self, index: int, count: int) -> Batch:
        return self.batches.validation(index, count)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats per token."""
        inputs, targets = batch
        return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())

    def sample(self, model: nn.Module, device: torch.device, comm: Comm) -> Sample | None:
        """How held-out text goes on."""
        run, sequence = self.config.run, self.config.data.sequence
        if not run.sample:
            return None
        prompt = self.corpus.validation[: min(32, sequence)].tolist()
        tokens = generate(model, prompt, run.sample, sequence=sequence, seed=run.seed, comm=comm, device=device)
        given, text = self.corpus.decode(prompt), self.corpus.decode(tokens)
        return Sample(f"{given!r} goes on", text, given + text)


def corpus_digest(corpus: Corpus) -> str:
    """What ranks compare to know that they have read the same text: its length and both of its ends."""
    train, validation = corpus.train, corpus.validation
    ends = [part.tobytes() for tokens in (train, validation) for part in (tokens[:65536], tokens[-65536:])]
    return f"{len(train)} + {len(validation)} tokens, digest {zlib.crc32(b''.join(ends)):08x}"
