"""Next-token prediction on text: GPT-2 (Radford et al., 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...comm.communicator import Comm
from ..models import GPT
from ..sampling import generate
from .base import Batch, Sample, cross_entropy
from .text import TextTask


class GPTTask(TextTask):
    """A decoder that predicts each token from those before it."""

    def model(self) -> nn.Module:
        return GPT(self.corpus.vocabulary, self.config.data.sequence, self.shape, self.config.model.tied)

    def train(self, position: int) -> Batch:
        return self.batches.train(position)

    def validation_batches(self, wanted: int) -> int:
        return wanted or self.held_out_batches  # more than that overlap

    def validation(self, index: int, count: int) -> Batch:
        return self.batches.validation(index, count)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats per token."""
        inputs, targets = batch
        return cross_entropy(model, model.states(inputs), targets)

    def sample(self, model: nn.Module, device: torch.device, comm: Comm) -> Sample | None:
        """How held-out text goes on."""
        run, sequence = self.config.run, self.config.data.sequence
        if not run.sample:
            return None
        prompt = self.corpus.validation[: min(32, sequence)].tolist()
        tokens = generate(model, prompt, run.sample, sequence=sequence, seed=run.seed, comm=comm, device=device)
        start, text = self.corpus.decode(prompt), self.corpus.decode(tokens)
        return Sample(f"{start!r} goes on", text, start + text)
