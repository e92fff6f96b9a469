"""The layers that are on a rank, whatever way their parameters are kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from .evaluator import LayerCall, LayerEvaluator
from .random_keys import LayerRandom

Tensors = tuple[torch.Tensor, ...]
# What watches evaluations: called with the layer's index, the name of its class, its parameters, inputs and output.
Look = Callable[[int, str, Iterable[torch.Tensor], Any, Any], None]


class LayerStore(Protocol):
    """A rank's own layers, by their index in the network."""

    @property
    def modules(self) -> Mapping[int, nn.Module]:
        """The layers that are modules of their own; none where their parameters are stacked."""

    @property
    def example(self) -> nn.Module | None:
        """A module from which to tell what any layer computes; None on a rank without layers."""

    def register(self, owner: nn.Module) -> None:
        """Makes what holds the parameters children of a module; called once."""

    # --- parameters --------------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> dict[int, tuple[nn.Parameter, ...]]:
        """Parameters that require gradients now, by layer. One that holds several layers' is the first layer's here."""

    def by_layer(self, tensors: Mapping[int, tuple[torch.Tensor | None, ...]]) -> dict[int, tuple]:
        """Something for each of :meth:`trainable_parameters`, cut up into single layers'."""

    def gradients(self, excluded: Collection[nn.Parameter]) -> dict[int, list[torch.Tensor]]:
        """What ``.grad`` holds by layer, each parameter once, with the first layer that has it; some are left out."""

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluator(self, call: LayerCall) -> LayerEvaluator:
        """What evaluates the layers in one call."""

    def run(self, call: LayerCall, state: Tensors) -> Tensors:
        """The plain loop over the layers, under autograd itself."""

    def drawing(self, random: LayerRandom) -> str | None:
        """The layers that draw random numbers, in words; None if there are none."""

    def watched(self, look: Look) -> AbstractContextManager[None]:
        """Inside, ``look`` is called after each evaluation of a layer."""

    def select(self, layers: Sequence[int]) -> AbstractContextManager[LayerStore]:
        """Inside, those of the layers that are here, numbered by their places in ``layers``."""

    # --- state dict --------------------------------------------------------------------------------------------------

    def save(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds the entries that the children do not add themselves."""

    def load(self, state_dict: dict[str, Any], prefix: str, missing: list[str], errors: list[str]) -> None:
        """Takes up the entries that the children do not take up themselves."""

    def may_have(self, layer: int, entry: str) -> bool:
        """Whether the state dict of a layer, of any rank's, may have an entry; the children refuse what they can tell
        themselves."""
