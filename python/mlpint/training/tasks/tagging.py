"""Word tagging: the universal part of speech of each word of a treebank ("MC" in arXiv 2601.09026)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ...comm.communicator import Comm
from ...comm.fingerprint import crc
from ...errors import ConfigError, DataError
from ..config import TrainConfig
from ..data.conllu import UPOS, Sentence, read_conllu
from ..data.order import draws
from ..data.words import FEATURES, WordFeatures
from ..models import Tagger
from .base import IGNORED, Batch, Sample, cross_entropy, measured
from .examples import ExamplesTask


class TaggingTask(ExamplesTask):
    """An encoder that tags the words of a sentence. What it knows of words comes from the training sentences alone."""

    unit = "sentences"
    training: list[Sentence]
    held_out: list[Sentence]

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        data = config.data
        if not data.data:
            raise ConfigError("data = '': must name a CoNLL-U file or directory for task = 'tagging'")
        sentences, self.name = read_conllu(data.data), data.data
        if data.validation:
            self.training, self.held_out = sentences, read_conllu(data.validation)
        else:
            cut = len(sentences) - max(1, len(sentences) // 10)
            self.training, self.held_out = sentences[:cut], sentences[cut:]
        self._check_lengths(data.sequence)
        self._deal()
        self.features = WordFeatures(word for sentence in self.training for word in sentence.words)
        # How often a training word is shown as if it had never been seen, so that unknown ones are learnt from.
        self.hidden = np.where(np.arange(len(self.features)) > 0, 0.5 / (0.5 + self.features.counts), 0)

    def _check_lengths(self, limit: int) -> None:
        longest = max((s for s in (*self.training, *self.held_out)), key=lambda s: len(s.words))
        if len(longest.words) > limit:
            raise DataError(
                f"{self.name}: sentence {longest.about.get('sent_id', ' '.join(longest.words[:5]))!r} has "
                f"{len(longest.words)} words, sequence = {limit}; give a larger --sequence"
            )

    def describe(self) -> str:
        words, held_out = (sum(len(s.words) for s in part) for part in (self.training, self.held_out))
        return (
            f"{self.name}: {len(self.training):,} sentences with {words:,} words, {len(self.held_out):,} with "
            f"{held_out:,} held out; {len(self.features):,} features of words"
        )

    def digest(self) -> str:
        text = "\n".join(f"{s.words} {s.tags}" for s in (*self.training, *self.held_out))
        return f"{len(self.training)} + {len(self.held_out)} sentences, digest {crc(text.encode())}"

    def identity(self) -> dict[str, str]:
        return {"vocabulary": self.features.digest()}

    def model(self) -> nn.Module:
        return Tagger(len(self.features), len(UPOS), self.config.data.sequence, self.shape)

    def train(self, position: int) -> Batch:
        features, tags, lengths = self._batch([self.training[i] for i in self.order(position)])
        generator = draws(self.config.run.seed, position, 1)
        unseen = generator.random(features.shape[:2] + (1,)) < self.hidden[features]
        return torch.from_numpy(np.where(unseen, 0, features)), tags, lengths

    def validation(self, index: int, count: int) -> Batch:
        features, tags, lengths = self._batch([self.held_out[i] for i in self._validated(index, count)])
        return torch.from_numpy(features), tags, lengths

    def _batch(self, sentences: list[Sentence]) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """(features [batch, longest, FEATURES], tags [batch, longest], lengths [batch]), padded to the longest."""
        lengths = [len(s.words) for s in sentences]
        features = np.zeros((len(sentences), max(lengths), FEATURES), np.int64)
        tags = np.full((len(sentences), max(lengths)), IGNORED)
        for row, sentence in enumerate(sentences):
            features[row, : lengths[row]] = self.features(sentence.words)
            tags[row, : lengths[row]] = sentence.tags
        return features, torch.from_numpy(tags), torch.tensor(lengths)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats per word."""
        features, tags, lengths = batch
        return cross_entropy(model, model.states(features, lengths), tags)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        features, tags, lengths = batch
        return measured(model(features, lengths), tags)

    def sample(self, model: nn.Module, device: torch.device, comm: Comm) -> Sample | None:
        """A held-out sentence, tagged."""
        if not self.config.run.sample:
            return None
        sentence = max(self.held_out[:20], key=lambda s: len(s.words))
        features, _, lengths = self._batch([sentence])
        answers = model(torch.from_numpy(features).to(device), lengths.to(device)).argmax(-1)[0].tolist()
        text = " ".join(
            f"{word}/{UPOS[tag]}" + ("" if tag == right else f" (not {UPOS[right]})")
            for word, tag, right in zip(sentence.words, answers, sentence.tags, strict=True)
        )
        return Sample("a held-out sentence", text, text + "\n")
