"""What takes one batch through a rank's layers, whatever way their parameters are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..mgrit.stats import Stats
from ..state import State
from .random_keys import LayerRandom


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCall:
    """A call of a rank's layers with one batch.

    Attributes:
        arguments: positional and keyword arguments of the layers, beside the state; those that differ from layer to
            layer are :class:`mlpint.layers.arguments.PerLayer`.
        single: whether the state is one tensor, as opposed to a tuple.
        step_size_of: h by layer index.
        random: the layers' random numbers.
        key: (step, microbatch) of the dropout keys.
        stats: where evaluations are counted.
        record: keep what a backward needs.
        recompute: keep the layers' inputs alone for that, and evaluate the layers again.
        extras: the tensors among the arguments that gradients are wanted for (leaves).
        parameters: own parameters that gradients are wanted for, by layer index.
        adds: whether gradients of one parameter come from several evaluators that share them.
        autocast_dtype: what autocast casts to while layers are evaluated, also for a second time in a backward; None:
            whatever is in force at that time.
    """

    arguments: tuple[tuple, dict[str, Any]]
    single: bool
    step_size_of: Callable[[int], float]
    random: LayerRandom
    key: tuple[int, int]
    stats: Stats
    record: bool = False
    recompute: bool = False
    extras: tuple[torch.Tensor, ...] = ()
    parameters: Mapping[int, tuple[nn.Parameter, ...]] = dataclasses.field(default_factory=dict)
    adds: bool = False
    autocast_dtype: torch.dtype | None = None


class LayerEvaluator(Protocol):
    """Evaluates layers for the solver, several independent ones at once, and takes their vector-Jacobian products.

    Attributes:
        where: the layers at work, for errors.
        finishes_on_chain: whether nothing is lost where layers are finished one by one, instead of several at once.
        gradients: of parameters and extra tensors, complete once every layer has been finished.
    """

    @property
    def where(self) -> str: ...
    @property
    def finishes_on_chain(self) -> bool: ...

    gradients: GradientSums

    def forward(self, layers: Sequence[int], states: Sequence[State], level: int, is_final: bool) -> list[State]:
        """The states after the layers; ``is_final`` where these are final, so that a backward can follow."""

    def input_vjp(self, layers: Sequence[int], states: Sequence[State], level: int, is_final: bool) -> list[State]:
        """Gradients for the inputs; ``is_final`` where :meth:`finish` will be passed the same again."""

    def finish(
        self, layers: Sequence[int], states: Sequence[State], known: Sequence[State | None], level: int
    ) -> list[State]:
        """The last products with layers: gradients are added up, and what was kept of the layers is freed.

        known: the gradients for the inputs, where the last :meth:`input_vjp` has found them.
        """


class GradientSums(dict[torch.Tensor, torch.Tensor]):
    """Gradients by parameter, added up as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._own: set[torch.Tensor] = set()

    def add(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds in place only what was made here: autograd may give several parameters one tensor as their gradient."""
        old = self.get(weight)
        if old is None:
            self[weight] = gradient
        elif weight in self._own:
            old += gradient
        else:
            self[weight] = old + gradient
            self._own.add(weight)
