"""How blocks run as a coarse network: the interface that Multilevel sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from .copies import Copies, NamedParameters
from .hierarchy import Network
from .options import MultilevelOptions
from .stack_copies import Ahead


class Runner(Protocol):
    """Runs the blocks of a model as one of their coarse networks, and makes the copies that these train.

    Attributes:
        count: layers in all.
        common_layers: indices of layers that every network has, with their own step size.
        local_indices: layers that this process holds.
        parameters: those that are trained and that this process holds; empty for stacked parameters.
        ahead: see :class:`mlpint.multilevel.stack_copies.StackCopies`; empty for separate modules.
    """

    count: int
    common_layers: frozenset[int] = frozenset()
    local_indices: Sequence[int]
    parameters: NamedParameters
    ahead: Ahead

    def copies(
        self, network: Network, parent: Network, optimizer: torch.optim.Optimizer, options: MultilevelOptions
    ) -> Copies:
        """What a network trains; called where its parent's weights are in place."""

    def enter(self, network: Network) -> None:
        """From here on calls run the network. Where this raises, nothing has changed."""

    def exit(self) -> None:
        """From here on calls run all layers again."""

    def check(self, networks: Mapping[str, Network], options: MultilevelOptions) -> None:
        """Raises a ValueError where the blocks cannot run as these networks."""
        return None

    def agreed(self, decision: bool) -> bool:
        """A decision that all ranks take alike."""
        return decision

    def learnt(self) -> Iterable[tuple[str, torch.Tensor]]:
        """What coarse operators have learnt on the networks, by name, for a checkpoint."""
        return ()

    def load_learnt(self, networks: Mapping[str, Network], tensors: Mapping[str, torch.Tensor]) -> None:
        """Goes on from :meth:`learnt`."""
        return None
