"""LayerParallel stacks run as one of their coarse networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import torch

from ..mgrit.layout import Layout
from ..nn import BlockStack
from ..parallel.layer_parallel import LayerParallel
from .copies import NamedParameters, trainable
from .hierarchy import Network
from .module_copies import ModuleCopies
from .options import MultilevelOptions
from .runner import Runner
from .stack_copies import Ahead, StackCopies


class ParallelRunner(Runner):
    """A LayerParallel stack: every rank trains and averages the blocks that it owns; none is sent anywhere.

    Inside a coarse phase the stack is one of the network's layers, which are numbered anew and keep their ranks.

    Raises:
        ValueError: a layout, shared parameters or open layers that coarse networks cannot have.
    """

    def __init__(self, stack: LayerParallel) -> None:
        if stack.layout.kind != "block":
            raise ValueError(f"layout = {stack.layout.kind!r}: coarse networks run in layout='block' only")
        if stack.shared_parameters:
            raise ValueError(
                "layers on several ranks share parameters: coarse networks train blocks apart from each other; give "
                "each block its own"
            )
        self.stack, self.count, self._layout = stack, len(stack), stack.layout
        self.common_layers = frozenset((*self._layout.open_indices, *self._layout.close_indices))
        self.parameters: NamedParameters = {
            n: trainable(m) for n, m in stack.local_layers.items() if n not in self.common_layers
        }
        self.local_indices = self._layout.local_indices(stack.comm.rank)
        self.ahead: Ahead = {}
        self._layouts: dict[str, Layout] = {}  # of the networks
        self._leaving = ExitStack()

    def copies(
        self, network: Network, parent: Network, optimizer: torch.optim.Optimizer, options: MultilevelOptions
    ) -> ModuleCopies | StackCopies:
        return ModuleCopies(network, self.parameters, optimizer, options)

    def agreed(self, decision: bool) -> bool:
        """Rank 0's: FLOPs are not measured on a rank without layers."""
        return bool(self.stack.comm.broadcast(torch.tensor([decision], device="cpu")))

    def check(self, networks: Mapping[str, Network], options: MultilevelOptions) -> None:
        """Raises a ValueError if ranks have different options, or too few layers for these."""
        layout = self._layout
        self.stack.comm.vote({"options": str(options)}, "Multilevel")
        ends = (
            (layout.open_layers, 0, "first", layout.first_rank),
            (layout.close_layers, -1, "last", layout.last_rank),
        )
        for network in networks.values():
            for count, place, end, rank in ends:
                if count and layout.rank_of(network.layers[place]) != rank:
                    raise ValueError(
                        f"network {network.name} has no layer on rank {rank}, which owns the {end} layers of the "
                        "stack, and these belong to every network: take fewer ranks, or no open and close layers"
                    )
            if options.neighbours == "none":
                continue
            for n, others in zip(network.layers, network.stands_for, strict=True):
                far = [m for m in others if layout.rank_of(m) != layout.rank_of(n)]
                if far:
                    raise ValueError(
                        f"neighbours: layer {n} stands for layer {far[0]} in network {network.name}, which is another "
                        "rank's; pass neighbours='none', a cfactor that the number of networks divides, or fewer levels"
                    )

    def enter(self, network: Network) -> None:
        self._leaving.enter_context(self.stack.using(layout=self._layout_of(network)))

    def exit(self) -> None:
        self._leaving.close()

    def _layout_of(self, network: Network) -> Layout:
        if network.name not in self._layouts:
            self._layouts[network.name] = self._layout.select(network.layers, network.stretch)
        return self._layouts[network.name]

    # --- what coarse operators have learnt on the networks, for checkpoints ------------------------------------------

    def learnt(self) -> Iterator[tuple[str, torch.Tensor]]:
        """By network and name in :meth:`LayerParallel.learnt_tensors`."""
        for network, layout in self._layouts.items():
            for name, tensor in self.stack.learnt_tensors(layout).items():
                yield f"{network}/{name}", tensor

    def load_learnt(self, networks: Mapping[str, Network], tensors: Mapping[str, torch.Tensor]) -> None:
        device = self.stack.comm.device
        for network in networks.values():
            prefix = f"{network.name}/"
            learnt = {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}
            if learnt:
                self.stack.load_learnt_tensors(learnt, self._layout_of(network))


class ParallelStackRunner(ParallelRunner):
    """A LayerParallel stack whose parameters are stacked.

    Args:
        stack: the LayerParallel stack.
        own_layers: what holds the parameters of this rank's layers.

    Raises:
        ValueError: a layout or open layers that coarse networks cannot have.
    """

    def __init__(self, stack: LayerParallel, own_layers: BlockStack) -> None:
        super().__init__(stack)
        self.own_layers = own_layers
        if self.common_layers:
            raise ValueError(
                f"open_layers = {self._layout.open_layers}, close_layers = {self._layout.close_layers}: must be 0 for "
                "multilevel training of a BlockStack; or pass its to_blocks()"
            )

    def copies(
        self, network: Network, parent: Network, optimizer: torch.optim.Optimizer, options: MultilevelOptions
    ) -> StackCopies:
        layers = [n for n in parent.layers if n in self.local_indices]
        return StackCopies(network, layers, self.own_layers, optimizer, options, self.ahead)
