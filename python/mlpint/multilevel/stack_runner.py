"""A BlockStack in one process run as one of its coarse networks."""

from __future__ import annotations

import dataclasses

import torch

from ..nn import BlockStack
from .hierarchy import Network
from .options import MultilevelOptions
from .runner import Runner
from .stack_copies import StackCopies


class StackRunner(Runner):
    """While a coarse network runs, the stack holds the network's rows, and its step size is the network's."""

    def __init__(self, stack: BlockStack) -> None:
        self.stack, self.count = stack, len(stack)
        self.local_indices = range(self.count)
        self.parameters, self.ahead = {}, {}

    def copies(
        self, network: Network, parent: Network, optimizer: torch.optim.Optimizer, options: MultilevelOptions
    ) -> StackCopies:
        return StackCopies(network, parent.layers, self.stack, optimizer, options, self.ahead)

    def enter(self, network: Network) -> None:
        self._fine = self.stack.indices, self.stack.settings
        self.stack.indices = network.layers
        self.stack.settings = dataclasses.replace(
            self.stack.settings, step_size=self.stack.settings.step_size * network.stretch
        )

    def exit(self) -> None:
        self.stack.indices, self.stack.settings = self._fine
