"""What evaluators have in common that hand each layer to one of several others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from ..state import State
from .evaluator import LayerEvaluator

Known = Sequence[State | None]
Step = Callable[[Any, list[int], list[State], list[State | None]], list[State]]  # of the evaluator that is its first


class DividedEvaluator(ABC):
    """As :class:`mlpint.layers.evaluator.LayerEvaluator`, but for what the others have to say together.

    Args:
        active: the one that is at work.
    """

    def __init__(self, active: LayerEvaluator) -> None:
        self._active = active

    @property
    def where(self) -> str:
        return self._active.where

    def forward(self, layers: Sequence[int], states: Sequence[State], level: int, is_final: bool) -> list[State]:
        nothing = [None] * len(layers)
        return self._divide(layers, states, nothing, lambda e, n, s, _: e.forward(n, s, level, is_final))

    def input_vjp(self, layers: Sequence[int], states: Sequence[State], level: int, is_final: bool) -> list[State]:
        nothing = [None] * len(layers)
        return self._divide(layers, states, nothing, lambda e, n, s, _: e.input_vjp(n, s, level, is_final))

    def finish(self, layers: Sequence[int], states: Sequence[State], known: Known, level: int) -> list[State]:
        return self._divide(layers, states, known, lambda e, n, s, k: e.finish(n, s, k, level))

    @abstractmethod
    def _divide(self, layers: Sequence[int], states: Sequence[State], known: Known, step: Step) -> list[State]:
        """A step of every layer by the evaluator that it is for."""

    def _stepped(
        self,
        evaluator: LayerEvaluator,
        places: Sequence[int],
        layers: Sequence[int],
        states: Sequence[State],
        known: Known,
        step: Step,
    ) -> dict[int, State]:
        """The results of those of the layers that one evaluator takes, by their places; none where it takes none."""
        if not places:
            return {}
        self._active = evaluator
        found = step(evaluator, [layers[j] for j in places], [states[j] for j in places], [known[j] for j in places])
        return dict(zip(places, found, strict=True))
