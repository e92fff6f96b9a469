"""Machine translation: an encoder-decoder transformer on parallel text, measured in BLEU."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ...comm.communicator import Comm
from ...comm.fingerprint import crc
from ...errors import ConfigError, DataError
from ...parallel.gather_model import gather_model
from ..beam_search import beam_search
from ..config import TrainConfig
from ..data import bpe, pairs, parallel_text
from ..data.cache import cached
from ..models.translation import Stepwise, Translator
from .base import Batch, Sample, Task, cross_entropy

_VOCABULARY = 6000
_SHOWN = 5  # translations


class TranslationTask(Task):
    """Sentences in one language from those in another.

    ``val_loss`` is the cross-entropy in nats per token, ``val_bleu`` BLEU (Papineni et al., 2002, by sacrebleu) of
    greedy translations of the same pairs.
    """

    unit = "sentences"

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        versions = {name: _version(name) for name in ("tokenizers", "sacrebleu")}
        data, model = config.data, config.model
        if not data.data:
            raise ConfigError("data = '': must name parallel text, its directory or what its files' names start with")
        if data.source == data.target:
            raise ConfigError(f"target = {data.target!r}: must be another language than source")
        if 0 < model.vocabulary < bpe.SMALLEST:
            raise ConfigError(f"vocabulary = {model.vocabulary}: must be at least {bpe.SMALLEST} for translation")
        self.encoder_layers = _encoder_layers(config)
        self.text = parallel_text.load(data.data, data.source, data.target, data.validation)
        self.name = self.text["train"].names[0]
        arrays = self._arrays(model.vocabulary or _VOCABULARY, versions["tokenizers"])
        self.bpe = bpe.BytePairs(arrays["bpe"].tobytes())
        self.pairs = {
            split: pairs.Pairs(
                *(pairs.Ragged(arrays[f"{split}_{side}"], arrays[f"{split}_{side}_ends"]) for side in _SIDES)
            )
            for split in self.text
        }
        for split in self.text:
            self._check_lengths(split)
        self.buckets = pairs.Buckets(self.pairs["train"], data.batch, config.run.seed)
        self.per_batch = data.batch
        self.held_out_batches = -(-len(self.pairs["validation"]) // data.batch)

    def _arrays(self, vocabulary: int, version: str) -> Mapping[str, np.ndarray]:
        """The byte pairs, and the tokens of all sentences."""

        def build() -> dict[str, np.ndarray]:
            learnt = bpe.BytePairs.learn([*self.text["train"].source, *self.text["train"].target], vocabulary)
            arrays = {"bpe": np.frombuffer(learnt.saved, np.uint8)}
            for split, sentences in self.text.items():
                for side in _SIDES:
                    ragged = pairs.Ragged.of(learnt.encode(getattr(sentences, side)))
                    arrays |= {f"{split}_{side}": ragged.tokens, f"{split}_{side}_ends": ragged.ends}
            return arrays

        text = json.dumps([[split, s.source, s.target] for split, s in self.text.items()])
        settings = {"task": "translation", "vocabulary": vocabulary, "tokenizers": version}
        return cached((), settings | {"text": hashlib.sha256(text.encode()).hexdigest()}, build)

    def _check_lengths(self, split: str) -> None:
        longest = self.config.data.sequence
        for name, side in zip(self.text[split].names, _SIDES, strict=True):
            lengths = getattr(self.pairs[split], side).lengths
            if lengths.max() > longest:
                n = int(lengths.argmax())
                raise DataError(
                    f"{name}: line {self.text[split].lines[n]} has {lengths[n]} tokens, its end token included, more "
                    f"than sequence = {longest}; give --sequence {lengths[n]} or leave such pairs out"
                )

    def describe(self) -> str:
        counts = ", ".join(f"{len(pairs):,} {split}" for split, pairs in self.pairs.items())
        left_out = sum(sentences.left_out for sentences in {s.names: s for s in self.text.values()}.values())
        empty = f", {left_out:,} left out with an empty side" if left_out else ""
        data = self.config.data
        spans = "; an interval spans both encoder and decoder" if _spans_both(self.config, self.encoder_layers) else ""
        return (
            f"{self.name}: {data.source} -> {data.target}, pairs: {counts}{empty}; {self.bpe.vocabulary:,} tokens; "
            f"{self.encoder_layers} layers of the encoder{spans}"
        )

    def digest(self) -> str:
        sides = (side for pairs in self.pairs.values() for side in (pairs.source, pairs.target))
        parts = (array.tobytes() for side in sides for array in (side.tokens, side.ends))
        return f"{len(self.pairs['train'])} pairs, digest {crc(self.bpe.saved, *parts)}"

    def identity(self) -> dict[str, str]:
        return {"vocabulary": f"{self.bpe.vocabulary} tokens, digest {crc(self.bpe.saved)}"}

    def model(self) -> Translator:
        return Translator(self.bpe.vocabulary, self.shape, self.encoder_layers, self.config.model.tied)

    def train(self, position: int) -> Batch:
        return self.pairs["train"].batch(self.buckets(position))

    def validation(self, index: int, count: int) -> Batch:
        return self.pairs["validation"].batch(self._held_out(index, count))

    def _held_out(self, index: int, count: int) -> np.ndarray:
        return pairs.held_out(self.pairs["validation"], self.config.data.batch, index, count)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats per token, with label smoothing."""
        return _cross_entropy(model, batch, self.config.optimizer.label_smoothing)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        count = int((batch[3] != bpe.PAD).sum())
        return {"loss": (float(_cross_entropy(model, batch)) * count, count)}

    def validate(self, model: nn.Module, device: torch.device, comm: Comm) -> dict[str, float]:
        measures = super().validate(model, device, comm)
        count = self.validation_batches(self.config.run.eval_batches)
        which = np.concatenate([self._held_out(i, count) for i in range(count)])
        translations = self.translate(model, "validation", which, 1, device, comm)
        return measures | {"bleu": self.bleu("validation", which, translations)}

    def sample(self, model: nn.Module, device: torch.device, comm: Comm) -> Sample | None:
        """Translations of the test text, or of the held-out text where there is none."""
        run = self.config.run
        if not run.sample:
            return None
        split = "test" if "test" in self.text else "validation"
        sentences, which = self.text[split], np.arange(len(self.pairs[split]))
        translations = self.translate(model, split, which, run.beams, device, comm)
        shown = "\n".join(
            f"{sentences.source[n]}\n  -> {translations[n]}\n  (given: {sentences.target[n]})" for n in which[:_SHOWN]
        )
        bleu = self.bleu(split, which, translations)
        title = f"{split}, {len(which):,} sentences, {run.beams} beams: BLEU {bleu:.2f}"
        measures = {"bleu": bleu} if split == "test" else {}
        return Sample(title, shown, "".join(f"{line}\n" for line in translations), measures)

    def bleu(self, split: str, which: np.ndarray, translations: list[str]) -> float:
        """BLEU of the translations of some sentences, 0 to 100."""
        from sacrebleu import corpus_bleu

        return float(corpus_bleu(translations, [[self.text[split].target[n] for n in which]]).score)

    def translate(
        self, model: nn.Module, split: str, which: np.ndarray, beams: int, device: torch.device, comm: Comm
    ) -> list[str]:
        """Translations of some sentences of a split, by the exact network. Collective.

        The sentences are dealt out to the ranks, each of which holds all layers for as long as it takes: no rank waits
        for another's layers, and what a target's earlier tokens gave can be kept.
        """
        network, step_sizes = gather_model(model, self.model)
        source = self.pairs[split].source
        by_length = sorted(range(len(which)), key=lambda i: (int(source.lengths[which[i]]), i))
        own = by_length[comm.rank :: comm.size]
        own_translations: dict[int, str] = {}
        for start in range(0, len(own), self.config.data.batch):
            part = own[start : start + self.config.data.batch]
            rows = which[part]
            tokens, lengths = source.padded(rows).to(device), torch.from_numpy(source.lengths[rows]).to(device)
            with torch.no_grad():
                decoder = Stepwise(network, tokens, lengths, step_sizes)
            sequences = beam_search(
                decoder,
                [min(self.config.data.sequence, 2 * int(length) + 10) for length in lengths],
                beams=beams,
                start=bpe.START,
                end=bpe.END,
                never=(bpe.PAD, bpe.START),
                device=device,
            )
            own_translations |= {i: self.bpe.decode(sequence) for i, sequence in zip(part, sequences, strict=True)}
        gathered = [json.loads(message) for message in comm.gather(json.dumps(own_translations).encode())]
        everyone = {int(i): text for message in gathered for i, text in message.items()}
        return [everyone[i] for i in range(len(which))]


_SIDES = ("source", "target")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"task = 'translation': needs the package {package}, which is not installed; pip install 'mlpint[text]'"
        ) from None


def _encoder_layers(config: TrainConfig) -> int:
    model = config.model
    count = model.encoder_layers or model.layers // 2
    if not 0 < count < model.layers:
        raise ConfigError(
            f"encoder_layers = {model.encoder_layers}: must leave each of encoder and decoder at least one of "
            f"layers = {model.layers}"
        )
    return count


def _spans_both(config: TrainConfig, encoder_layers: int) -> bool:
    """Whether an interval of the coarsest grid has layers of both parts and is stepped over by the first of them, which
    moves one stream in place of the other. ``sum`` takes all of them, and gains by such an interval: the first layer of
    the decoder moves its stream most, and is alone there.
    """
    solver = config.solver
    mgrit, before = solver.mgrit(), encoder_layers - solver.open_layers
    inside = 0 < before < config.model.layers - solver.open_layers - solver.close_layers
    by_one = not mgrit.exact and mgrit.coarse in ("injection", "scaled", "fitted")
    return by_one and inside and before % mgrit.cfactor ** (mgrit.levels - 1) != 0


def _cross_entropy(model: Any, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
    source, lengths, shifted, wanted = batch
    return cross_entropy(model, model.states(source, lengths, shifted), wanted, smoothing, ignored=bpe.PAD)
