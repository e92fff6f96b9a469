"""What one evaluation of a step needs beside weights and state, and the parts of a step that depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import attention as attn
from . import cross_attention as cross
from . import ops
from .attending import Attending
from .batch_arguments import BatchArguments, Rotation
from .dropout import ATTENTION, CROSS_ATTENTION, Dropout
from .settings import NORMS, BlockSettings, Weights


class StepContext:
    """The settings, step size, attention and dropout keys of one evaluation of J blocks.

    Args:
        settings: what the blocks compute.
        attending: what their attention is told; M = batch x sequence of it.
        keys: J dropout keys; None where nothing is dropped.
        h: the whole step size, that of the settings times the solver's.
        rotation: as :class:`mlpint.nn.batch_arguments.BatchArguments` has it.
        memory: what decoders attend to, [J, B S, D].
        remembering: what their attention to it is told.
    """

    def __init__(
        self,
        settings: BlockSettings,
        attending: Attending,
        keys: Sequence[int] | None,
        h: float,
        rotation: Rotation | None = None,
        memory: torch.Tensor | None = None,
        remembering: cross.Remembering | None = None,
    ) -> None:
        self.settings, self.attending, self.h, self.rotation = settings, attending, h, rotation
        self.memory: Any = memory  # which steps that ask for it have
        self._remembering: Any = remembering
        self.batch = attending.batch
        self.keys = tuple(keys or ())
        self.eps = settings.eps
        self.activation = settings.activation
        self.drops = keys is not None and settings.dropout > 0
        self._thins = keys is not None and settings.attention_dropout > 0

    @classmethod
    def of(
        cls,
        settings: BlockSettings,
        arguments: BatchArguments,
        layers: Iterable[int],
        shape: Sequence[int],
        keys: Sequence[int] | None,
        h: float,
        memory: torch.Tensor | None = None,
    ) -> StepContext:
        """That of so many layers, by their indices, with states [B, T, D] and memories [J, B, S, D]."""
        attending = arguments.attending(settings, layers, *shape[:2])
        if memory is None:
            return cls(settings, attending, keys, h, arguments.rotation)
        remembering = arguments.remembering(settings, memory[0])
        return cls(settings, attending, keys, h, arguments.rotation, memory.flatten(1, 2), remembering)

    @classmethod
    def plain(cls, settings: BlockSettings, batch: int, sequence: int, h: float = 1.0) -> StepContext:
        """That of a batch with nothing beside the state, without dropout; layer 0's window holds for all."""
        return cls(settings, BatchArguments().attending(settings, [0], batch, sequence), None, h)

    def dropped(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """The increment x of the residual stream, or its gradient, behind its dropout."""
        return self._dropout(place)(x) if self.drops else x

    def _dropout(self, place: int) -> Dropout:
        return Dropout(self.keys, place, self.settings.dropout)

    def _attention_dropout(self, place: int) -> Dropout:
        return Dropout(self.keys, place, self.settings.attention_dropout)

    def onto_stream(
        self,
        a: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        x: torch.Tensor,
        h: float,
        place: int,
    ) -> torch.Tensor:
        """Returns x + h ((y - x) + drop(a W^T + b))."""
        if not self.drops:
            return ops.linear_axpy(a, weight, bias, y, x, h)
        return self.stepped(ops.linear(a, weight, bias), y, x, h, place)

    def stepped(self, update: torch.Tensor, y: torch.Tensor, x: torch.Tensor, h: float, place: int) -> torch.Tensor:
        """Returns x + h ((y - x) + drop(update)); the update's memory may be used up."""
        if not self.drops:
            return ops.residual_add(update, y, x, h)
        return self._dropout(place).step(update, y, x, h)

    def attention(self, qkv: torch.Tensor) -> torch.Tensor:
        """The attention of [J, M, 3 D], with nothing kept for a backward."""
        if self._thins:
            return self.attention_train(qkv)[0]
        return attn.attention(qkv, self.attending)

    def attention_train(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention, and what :meth:`attention_backward` takes as ``attended``."""
        if self._thins:
            return attn.dropout_attention(qkv, self.attending, self._attention_dropout(ATTENTION))
        return attn.attention_train(qkv, self.attending)

    def attention_backward(
        self, grad: torch.Tensor, qkv: torch.Tensor, o: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        """The gradient for qkv."""
        if self._thins:
            thinning = self._attention_dropout(ATTENTION)
            return attn.dropout_attention_backward(grad, qkv, o, attended, self.attending, thinning)
        return attn.attention_backward(grad, qkv, o, attended, self.attending)

    def cross_attention(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """As :meth:`attention`, of queries [J, B T, D] to a memory's keys and values [J, B S, 2 D]."""
        if self._thins:
            return self.cross_attention_train(q, kv)[0]
        return cross.cross_attention(q, kv, self._remembering)

    def cross_attention_train(self, q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`attention_train`."""
        if self._thins:
            return cross.dropout_cross_attention(q, kv, self._remembering, self._attention_dropout(CROSS_ATTENTION))
        return cross.cross_attention_train(q, kv, self._remembering)

    def cross_attention_backward(
        self, grad: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, o: torch.Tensor, attended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients for q and kv."""
        if self._thins:
            thinning = self._attention_dropout(CROSS_ATTENTION)
            return cross.dropout_cross_attention_backward(grad, q, kv, attended, self._remembering, thinning)
        return cross.cross_attention_backward(grad, q, kv, o, attended, self._remembering)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast takes products in; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, for steps that cast for themselves; where there is none to leave it costs nothing."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def for_products(w: Weights[torch.Tensor], dtype: torch.dtype | None) -> Weights[torch.Tensor]:
    """The weights, with the matrices and their biases in the dtype that products are taken in."""
    if dtype is None:
        return w
    cast = (t if t is None or n.startswith(NORMS) else t.to(dtype) for n, t in zip(Weights._fields, w, strict=True))
    return Weights(*cast)
