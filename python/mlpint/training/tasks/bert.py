"""Masked language modelling: BERT (Devlin et al., 2019), with 20% of the tokens masked as in arXiv 2601.09026."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ...comm.communicator import Comm
from ..config import TrainConfig
from ..data.order import draws
from ..models import BERT
from .base import Batch, Sample, cross_entropy, measured
from .text import TextTask

_TRAIN, _VALIDATION = range(2)


class BERTTask(TextTask):
    """An encoder that names masked tokens from those on both sides.

    A fixed part of each sequence is to be named: 80% of that are replaced by a mask token, 10% by any token, and 10%
    stay as they are.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.mask_token = self.corpus.vocabulary
        self.masked = max(1, round(config.data.mask * config.data.sequence))

    def describe(self) -> str:
        return f"{super().describe()}, {self.masked} of {self.config.data.sequence} masked"

    def model(self) -> nn.Module:
        vocabulary = self.corpus.vocabulary + 1  # the mask token
        return BERT(vocabulary, self.config.data.sequence, self.shape, self.config.model.tied)

    def train(self, position: int) -> Batch:
        return self._mask(self.batches.train(position)[0], self.config.run.seed, _TRAIN, position)

    def validation(self, index: int, count: int) -> Batch:
        # The same places whatever the run's seed, so that runs with other seeds can be compared.
        return self._mask(self.batches.validation(index, count)[0], 0, _VALIDATION, index)

    def _mask(self, tokens: torch.Tensor, seed: int, part: int, position: int) -> Batch:
        """(inputs [batch, sequence], places [batch, n], targets [batch, n])."""
        generator = draws(seed, position, 1 + part)
        drawn = generator.random(tokens.shape).argpartition(self.masked - 1)[:, : self.masked]
        places = torch.from_numpy(np.sort(drawn))
        lot = generator.random(places.shape)
        any_token = generator.integers(self.corpus.vocabulary, size=places.shape)
        targets = tokens.gather(1, places)
        replaced = torch.from_numpy(np.where(lot < 0.8, self.mask_token, np.where(lot < 0.9, any_token, -1)))
        inputs = tokens.scatter(1, places, torch.where(replaced < 0, targets, replaced))
        return inputs, places, targets

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats per masked token."""
        inputs, places, targets = batch
        return cross_entropy(model, model.states(inputs, places), targets)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        inputs, places, targets = batch
        return measured(model(inputs, places), targets)

    def sample(self, model: nn.Module, device: torch.device, comm: Comm) -> Sample | None:
        """A held-out sequence, with what is masked in it and what the model takes it for."""
        if not self.config.run.sample:
            return None
        inputs, places, targets = (t[:1] for t in self.validation(0, 1))
        answers = model(inputs.to(device), places.to(device)).argmax(-1).cpu()
        named = inputs.scatter(1, places, answers)
        text = "\n".join(self._text(tokens[0].tolist()) for tokens in (inputs, named))
        right = int((answers == targets).sum())
        return Sample(f"{right} of {targets.numel()} masked tokens named", text, text + "\n")

    def _text(self, tokens: list[int]) -> str:
        """The text of tokens in one line, with underscores for masks."""
        runs: list[list[int]] = [[]]
        for token in tokens:
            if token == self.mask_token:
                runs.append([])
            else:
                runs[-1].append(token)
        mask = "_" if self.corpus.is_text else " _ "
        return mask.join(self.corpus.decode(run) for run in runs).replace("\n", " ")
