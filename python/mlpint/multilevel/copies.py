"""What a coarse network trains: the common interface of the copies of separate modules and of stacked parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

from .optimizer_state import ParameterState

NamedParameters = Mapping[int, Mapping[str, nn.Parameter]]  # layer -> name in the layer -> parameter
Key = tuple[int, str]  # layer, name in the layer


class Copies(Protocol):
    """A coarse network's own parameters and the optimiser's state for them, made where its parent's are in place."""

    def swap(self) -> None:
        """Puts the copies in the parameters' place and stores the parent's, or the other way round."""

    def prolong(self) -> None:
        """Averages the copies, which are stored, into the parent's weights, which are in place."""

    def weights(self) -> Iterable[tuple[Key, torch.Tensor]]:
        """The stored copies, for a checkpoint."""

    def states(self) -> Mapping[Key, ParameterState]:
        """The optimiser's state for them, which is stored too."""

    def load(self, weights: Mapping[Key, torch.Tensor], states: Mapping[Key, ParameterState]) -> None:
        """Takes the place of the stored copies and state by a checkpoint's."""


def trainable(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a layer that are trained."""
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}
