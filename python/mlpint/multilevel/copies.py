"""The weights that a coarse network trains, while its parent keeps its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .hierarchy import Network
from .settings import Settings
from .state import ParameterState, check_averaged, placed, prolonged, restricted

Named = Mapping[int, Mapping[str, nn.Parameter]]  # layer -> name in the layer -> parameter
Key = tuple[int, str]  # layer, name in the layer


def trainable(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a layer that are trained."""
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


class ModuleCopies:
    """Copies of the parameters of a network's layers, and the optimiser's state for them.

    The parameters stay the objects that model and optimiser hold: :meth:`swap` exchanges what they point to for what is
    kept aside. Made where the parent's weights are in place.

    Args:
        network: whose copies these are.
        parameters: all trainable parameters of this rank's layers.
        optimizer: the user's.
        settings: of the training.
        kept: the network's optimiser state of earlier cycles, which ``state="separate"`` goes on with.
    """

    def __init__(
        self,
        network: Network,
        parameters: Named,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        kept: Mapping[Key, ParameterState],
    ) -> None:
        self.network, self.optimizer, self.settings, self._parameters = network, optimizer, settings, parameters
        self._own = {(n, name): p for n in network.layers for name, p in parameters.get(n, {}).items()}
        self.aside = {key: p.detach().clone() for key, p in self._own.items()}
        self.state: dict[Key, ParameterState] = {}
        for key, p in self._own.items():
            self.state[key] = self._start(key, p, kept)

    def _start(self, key: Key, p: nn.Parameter, kept: Mapping) -> ParameterState:
        now = self.optimizer.state.get(p, {})
        if self.settings.state == "separate":
            return placed(kept.get(key, {}), p)
        if self.settings.state == "restrict":
            check_averaged(f"layer {key[0]}'s {key[1]}", now, p.shape)
            return restricted(now, self.network.ratio)
        return {}

    def swap(self) -> None:
        """Puts the copies in the parameters' place, or the parent's weights back."""
        for key, p in self._own.items():
            self.aside[key], p.data = p.data, self.aside[key]
            if self.settings.state != "carry":
                now = self.optimizer.state.pop(p, {})
                if self.state[key]:
                    self.optimizer.state[p] = self.state[key]
                self.state[key] = now

    @torch.no_grad()
    def prolong(self) -> None:
        """Averages the copies into the parent's weights, which are in place."""
        delta, ratio = self.settings.delta, self.network.ratio
        neighbours = dict(zip(self.network.layers, self.network.stands_for, strict=True))
        for (n, name), p in self._own.items():
            coarse = self.aside[n, name]
            for other in neighbours[n] if self.settings.neighbours != "none" else ():
                q = self._parameters[other][name]
                if self.settings.neighbours == "average":
                    q.lerp_(coarse, delta)
                else:
                    q.add_(coarse - p, alpha=delta)
            p.lerp_(coarse, delta)
            if self.settings.state == "restrict" and self.state[n, name]:
                mine = self.optimizer.state.get(p, {})
                check_averaged(f"layer {n}'s {name}", self.state[n, name], p.shape)
                self.optimizer.state[p] = prolonged(mine, self.state[n, name], ratio, delta)

    # --- for checkpoints ---------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[Key, torch.Tensor]]:
        """The copies, kept aside."""
        yield from self.aside.items()

    def states(self) -> dict[Key, ParameterState]:
        """The optimiser's state for them, kept aside."""
        return self.state

    def load(self, weights: Mapping[Key, torch.Tensor], states: Mapping[Key, ParameterState]) -> None:
        """Takes up copies and state as they were kept aside."""
        for key, p in self._own.items():
            self.aside[key] = weights[key].to(p)
            self.state[key] = placed(states.get(key, {}), p)
