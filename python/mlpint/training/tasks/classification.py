"""Classes of texts: a BERT's encoder fine-tuned, or trained from scratch, to name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...comm.communicator import Comm
from ...comm.fingerprint import crc
from ...errors import ConfigError
from ..config import TrainConfig
from ..data.labelled import LabelledText, load_labelled
from ..data.order import spread
from ..data.subwords import read_subwords
from ..models import TextClassifier
from .base import Batch, Sample, cross_entropy, measured
from .examples import ExamplesTask

_BYTES = 256


class ClassificationTask(ExamplesTask):
    """An encoder that names the class of a text. Its tokens are those of ``task = "bert"`` on text: bytes or pairs."""

    unit = "texts"
    training: list[LabelledText]
    held_out: list[LabelledText]

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        data = config.data
        if not data.data:
            raise ConfigError("data = '': must name a CoNLL-U or .tsv file for task = 'classification'")
        if data.tokenizer == "bpe":
            raise ConfigError(
                "tokenizer = 'bpe': must be 'bytes', or the tokenizer.json of the run that the weights come from"
            )
        if data.tokenizer != "bytes":
            self.subwords = read_subwords(data.tokenizer, config.model.vocabulary)
        elif 0 < config.model.vocabulary < _BYTES:
            least = f"must be at least {_BYTES} for {data.data}, which is read as bytes"
            raise ConfigError(f"vocabulary = {config.model.vocabulary}: {least}")
        self.vocabulary = self.subwords.vocabulary if self.subwords else config.model.vocabulary or _BYTES
        self.training, self.held_out = load_labelled(data.data, data.validation, data.label)
        self.name = data.data
        everyone = (*self.training, *self.held_out)
        self.classes = sorted({text.label for text in everyone})
        self._encoded = {text.text: tokens for text, tokens in zip(everyone, self._encode(everyone), strict=True)}
        self._deal()

    def describe(self) -> str:
        everyone, limit = (*self.training, *self.held_out), self.config.data.sequence
        cut = sum(len(self._encoded[text.text]) > limit for text in everyone)
        usual = Counter(text.label for text in self.training).most_common(1)[0][0]
        share = sum(text.label == usual for text in self.held_out) / len(self.held_out)
        tokens = "tokens" if self.subwords else "bytes"
        return (
            f"{self.name}: {len(self.training):,} texts, {len(self.held_out):,} held out, {cut:,} cut to {limit} "
            f"{tokens}; {len(self.classes)} classes, {share:.1%} of the texts held out are {usual}"
        )

    def digest(self) -> str:
        text = "\n".join(f"{t.label} {t.text}" for t in (*self.training, *self.held_out))
        return f"{len(self.training)} + {len(self.held_out)} texts, digest {crc(text.encode())}"

    def identity(self) -> dict[str, str]:
        digest = crc("\n".join(self.classes).encode())
        tokens = self.subwords.identity if self.subwords else f"{self.vocabulary} tokens"
        return {"vocabulary": tokens, "classes": f"{len(self.classes)}, digest {digest}"}

    def model(self) -> nn.Module:
        vocabulary = self.vocabulary + 1  # the token that masks others in pre-training
        return TextClassifier(len(self.classes), vocabulary, self.config.data.sequence, self.shape)

    def train(self, position: int) -> Batch:
        return self._batch([self.training[i] for i in self.order(position)])

    def validation(self, index: int, count: int) -> Batch:
        return self._batch([self.held_out[i] for i in self._validated(index, count)])

    def _batch(self, texts: list[LabelledText]) -> Batch:
        """(tokens [batch, longest], classes [batch], lengths [batch]), padded to the longest."""
        rows = [self._tokens(text) for text in texts]
        lengths = [len(row) for row in rows]
        tokens = np.zeros((len(rows), max(lengths)), np.int64)
        for n, row in enumerate(rows):
            tokens[n, : len(row)] = row
        classes = [self.classes.index(text.label) for text in texts]
        return torch.from_numpy(tokens), torch.tensor(classes), torch.tensor(lengths)

    def _encode(self, texts: Sequence[LabelledText]) -> list[np.ndarray]:
        if self.subwords is None:
            return [np.frombuffer(text.text.encode(), np.uint8) for text in texts]
        return [np.array(tokens) for tokens in self.subwords.pairs.encode([text.text for text in texts])]

    def _tokens(self, text: LabelledText) -> np.ndarray:
        """The tokens of a text; of one that is too long, both ends (Sun et al., 2019: better than its beginning)."""
        tokens, limit = self._encoded[text.text], self.config.data.sequence
        if len(tokens) <= limit:
            return tokens
        return np.concatenate([tokens[: limit - limit // 2], tokens[len(tokens) - limit // 2 :]])

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats per text."""
        tokens, classes, lengths = batch
        return cross_entropy(model, model.states(tokens, lengths), classes)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        tokens, classes, lengths = batch
        return measured(model(tokens, lengths), classes)

    def sample(self, model: nn.Module, device: torch.device, comm: Comm) -> Sample | None:
        """Some held-out texts with the classes found."""
        if not self.config.run.sample:
            return None
        texts = [self.held_out[i] for i in spread(len(self.held_out), 10, 0, 1)]
        tokens, _, lengths = self._batch(texts)
        answers = [self.classes[i] for i in model(tokens.to(device), lengths.to(device)).argmax(-1).tolist()]
        lines = [
            name + ("" if name == text.label else f" (not {text.label})") + f": {text.text}"
            for name, text in zip(answers, texts, strict=True)
        ]
        return Sample("classes of held-out texts", "\n".join(lines), "\n".join(lines) + "\n")
