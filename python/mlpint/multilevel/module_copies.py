"""The weights of separate modules that a coarse network trains, while its parent keeps its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from .copies import Key, NamedParameters
from .hierarchy import Network
from .optimizer_state import ParameterState, check_averaged, placed, prolonged, restricted
from .options import MultilevelOptions


class ModuleCopies:
    """Copies of the parameters of a network's layers, and the optimiser's state for them.

    The parameters stay the objects that model and optimiser hold: :meth:`swap` exchanges what they point to for what is
    stored.

    Args:
        network: whose copies these are.
        parameters: all trainable parameters of this rank's layers.
        optimizer: the user's.
        options: those of the training.
    """

    def __init__(
        self,
        network: Network,
        parameters: NamedParameters,
        optimizer: torch.optim.Optimizer,
        options: MultilevelOptions,
    ) -> None:
        self.network, self.optimizer, self.options, self._parameters = network, optimizer, options, parameters
        self._own = {(n, name): p for n in network.layers for name, p in parameters.get(n, {}).items()}
        self.stored = {key: p.detach().clone() for key, p in self._own.items()}
        self.stored_state: dict[Key, ParameterState] = {}
        if options.state == "restrict":
            for (n, name), p in self._own.items():
                state = optimizer.state.get(p, {})
                check_averaged(f"layer {n}'s {name}", state, p.shape)
                self.stored_state[n, name] = restricted(state, network.ratio)

    def swap(self) -> None:
        for key, p in self._own.items():
            self.stored[key], p.data = p.data, self.stored[key]
            if self.options.state == "restrict":
                state = self.optimizer.state.pop(p, {})
                if self.stored_state[key]:
                    self.optimizer.state[p] = self.stored_state[key]
                self.stored_state[key] = state

    @torch.no_grad()
    def prolong(self) -> None:
        delta, ratio = self.options.delta, self.network.ratio
        neighbours = dict(zip(self.network.layers, self.network.stands_for, strict=True))
        for (n, name), p in self._own.items():
            coarse = self.stored[n, name]
            for neighbour in neighbours[n] if self.options.neighbours == "average" else ():
                self._parameters[neighbour][name].lerp_(coarse, delta)
            p.lerp_(coarse, delta)
            if self.options.state == "restrict" and self.stored_state[n, name]:
                coarse_state = self.stored_state[n, name]
                check_averaged(f"layer {n}'s {name}", coarse_state, p.shape)
                state = self.optimizer.state.get(p, {})
                self.optimizer.state[p] = prolonged(state, coarse_state, ratio, delta)

    def weights(self) -> Iterator[tuple[Key, torch.Tensor]]:
        yield from self.stored.items()

    def states(self) -> dict[Key, ParameterState]:
        return self.stored_state

    def load(self, weights: Mapping[Key, torch.Tensor], states: Mapping[Key, ParameterState]) -> None:
        for key, p in self._own.items():
            self.stored[key] = weights[key].to(p)
            if self.options.state == "restrict":
                self.stored_state[key] = placed(states.get(key, {}), p)
