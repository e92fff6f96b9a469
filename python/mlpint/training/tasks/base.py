"""What a task is to the training loop."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ...comm.communicator import Comm
from ...mgrit.recorder import span
from ...parallel import LayerParallel, shard_loss
from ..config import TrainConfig
from ..data.subwords import Subwords
from ..models import Shape

Batch = tuple[torch.Tensor, ...]

IGNORED = -100  # a target that does not count: padding


class Sample(NamedTuple):
    """What a trained model does, to be looked at: shown under a title, and written to sample.txt.

    Attributes:
        measures: of the sample as a whole, by name; written to metrics.jsonl as ``test_...``.
    """

    title: str
    shown: str
    written: str
    measures: Mapping[str, float] = MappingProxyType({})


class Task(abc.ABC):
    """Data, a model for them, the loss to be minimised and what is measured on held-out data.

    It is made on every rank from the same configuration and reads its files at once. Batches are functions of the seed
    and of their number alone, in host memory: all ranks draw the same ones, and a run can go on anywhere.

    Attributes:
        name: where the data came from.
        unit: what a run's progress is counted in.
        per_batch: so many of them are in a batch; of padded sequences, with the padding.
        held_out_batches: batches that go once through the held-out data.
        subwords: what tokens stand for; None where they are no byte pairs, or translation's.
    """

    name: str
    unit = "tokens"
    per_batch: int
    held_out_batches: int
    subwords: Subwords | None = None

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def shape(self) -> Shape:
        """The size of the model."""
        model = self.config.model
        llama = model.arch == "llama"
        return Shape(model.layers, model.dim, model.heads, model.ffn, model.dropout, llama, model.kv_heads)

    @abc.abstractmethod
    def describe(self) -> str:
        """The data in one line."""

    @abc.abstractmethod
    def digest(self) -> str:
        """What ranks compare to know that they have read the same data."""

    def identity(self) -> dict[str, str]:
        """What must not change between a checkpoint and the run that goes on with it, such as the vocabulary."""
        return {}

    def files(self) -> dict[str, bytes]:
        """What belongs in a run's directory beside its metrics, by name: the byte pairs, where tokens are such."""
        return {"tokenizer.json": self.subwords.pairs.saved} if self.subwords else {}

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """A new model, drawn from torch's generator. Its ``nn.ModuleList`` ``blocks`` is to be solved in parallel."""

    @abc.abstractmethod
    def train(self, position: int) -> Batch:
        """Batch 0, 1, ... of the training data."""

    @abc.abstractmethod
    def validation(self, index: int, count: int) -> Batch:
        """Batch ``index`` of ``count`` from the held-out data, the same each time."""

    def validation_batches(self, wanted: int) -> int:
        """How many batches a validation takes if so many are wanted; 0: those that go through all held-out data."""
        return min(wanted or self.held_out_batches, self.held_out_batches)

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss of a batch, a scalar."""

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        """Sums over the batch by name, each with what it is to be divided by; both are added up over batches first."""
        return {"loss": (float(self.loss(model, batch)), 1)}

    def validate(self, model: nn.Module, device: torch.device, comm: Comm) -> dict[str, float]:
        """Measures on held-out data, by name; one of them is ``loss``. Collective; the model is in eval mode."""
        sums: dict[str, tuple[float, float]] = {}
        count = self.validation_batches(self.config.run.eval_batches)
        for i in range(comm.data.rank, count, comm.data.size):  # each replica takes its share
            batch = tuple(t.to(device) for t in self.validation(i, count))
            for name, (value, weight) in self.measure(model, batch).items():
                total, weights = sums.get(name, (0, 0))
                sums[name] = total + value, weights + weight
        if comm.data.size > 1:
            shares = [json.loads(message) for message in comm.data.gather(json.dumps(sums).encode())]
            sums = {
                name: (
                    sum(share[name][0] for share in shares if name in share),
                    sum(share[name][1] for share in shares if name in share),
                )
                for name in dict.fromkeys(name for share in shares for name in share)
            }
        return {name: total / weight for name, (total, weight) in sums.items()}

    def sample(self, model: nn.Module, device: torch.device, comm: Comm) -> Sample | None:
        """Shows what the model has learnt. Collective; the model is in eval mode."""
        return None


def cross_entropy(
    model: Any, states: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0, ignored: int = IGNORED
) -> torch.Tensor:
    """Mean cross-entropy in nats of ``model.logits(states)``; ranks that share the layers share the work.

    Args:
        model: with ``blocks`` and ``logits``.
        states: [..., dim], the same on all ranks.
        targets: [...] int64.
        smoothing: of the labels.
        ignored: target that counts nothing.
    """

    def head(rows: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model.logits(rows).float()
        losses = F.cross_entropy(logits, wanted, ignore_index=ignored, reduction="sum", label_smoothing=smoothing)
        return losses, (wanted != ignored).sum()

    with span("head"):
        if isinstance(model.blocks, LayerParallel) and model.blocks.comm.size > 1:
            return shard_loss(head, states, targets, comm=model.blocks.comm)
        total, count = head(states.flatten(0, -2), targets.flatten())
        return total / count


def measured(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, tuple[float, float]]:
    """What :meth:`Task.measure` gives of a classification: cross-entropy and accuracy, over targets not IGNORED.

    Args:
        logits: [..., classes].
        targets: [...] int64.
    """
    logits, targets = logits.float().flatten(0, -2), targets.flatten()
    count = int((targets != IGNORED).sum())
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return {"loss": (float(loss), count), "accuracy": (float((logits.argmax(-1) == targets).sum()), count)}
