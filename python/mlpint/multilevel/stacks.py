"""LayerParallel stacks run as one of their coarse networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

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
        if stack.layout != "block":
            raise ValueError(f"layout = {stack.layout!r}: coarse networks run in layout='block' only")
        if stack.shared_parameters:
            raise ValueError(
                "layers on several ranks share parameters: coarse networks train blocks apart from each other; give "
                "each block its own"
            )
        self.stack, self.count = stack, stack.layer_count
        self.ahead: Ahead = {}
        self._solved: dict[str, dict[str, Any]] = {}  # solvers and learnt operators of the networks
        self.common_layers = frozenset((*stack.open_indices, *stack.close_indices))
        if self.common_layers and stack.stacked is not None:
            raise ValueError(
                f"open_layers = {stack.open_layers}, close_layers = {stack.close_layers}: must be 0 for multilevel "
                "training of a BlockStack; or pass its to_blocks()"
            )
        modules = stack.local_layers if stack.stacked is None else {}
        self.parameters: NamedParameters = {n: trainable(m) for n, m in modules.items() if n not in self.common_layers}
        self.local_indices = list(stack.local_indices)

    def copies(
        self, network: Network, parent: Network, optimizer: torch.optim.Optimizer, options: MultilevelOptions
    ) -> ModuleCopies | StackCopies:
        if self.stack.stacked is None:
            return ModuleCopies(network, self.parameters, optimizer, options)
        mine = set(self.local_indices)
        layers = [n for n in parent.layers if n in mine]
        return StackCopies(network, layers, self.stack.stacked, optimizer, options, self.ahead)

    def agreed(self, decision: bool) -> bool:
        """Rank 0's: FLOPs are not measured on a rank without layers."""
        return bool(self.stack.comm.broadcast(torch.tensor([decision])))

    def check(self, networks: Mapping[str, Network], options: MultilevelOptions) -> None:
        """Raises a ValueError if ranks have different options, or too few layers for these."""
        stack = self.stack
        stack.comm.vote({"options": str(options)}, "Multilevel")
        for network in networks.values():
            for kept, layer, end in ((stack.open_layers, 0, "first"), (stack.close_layers, -1, "last")):
                whole, mine = getattr(stack, f"{end}_rank"), stack.rank_of(network.layers[layer])
                if kept and mine != whole:
                    raise ValueError(
                        f"network {network.name} has no layer on rank {whole}, which owns the {end} layers of the "
                        "stack, and these belong to every network: take fewer ranks, or no open and close layers"
                    )
            if options.neighbours == "none":
                continue
            for n, others in zip(network.layers, network.stands_for, strict=True):
                far = [m for m in others if self.stack.rank_of(m) != self.stack.rank_of(n)]
                if far:
                    raise ValueError(
                        f"neighbours: layer {n} stands for layer {far[0]} in network {network.name}, which is another "
                        "rank's; pass neighbours='none', a cfactor that the number of networks divides, or fewer levels"
                    )

    def enter(self, network: Network) -> None:
        stack = self.stack
        numbered = sorted({*network.layers, *self.common_layers})
        number = {n: i for i, n in enumerate(numbered)}
        owners = [stack.rank_of(n) for n in network.layers]
        local = [n for n in numbered if n in set(self.local_indices)]
        inside: dict[str, Any] = {
            "layer_count": len(numbered),
            "depth": len(network.layers),
            "step_size": stack.step_size * network.stretch,
            "local_indices": [number[n] for n in local],
            "local_layers": {number[n]: m for n, m in stack.local_layers.items() if n in number},
            "random": stack.random.renumbered(number),
            "_owners": owners,
            "first_rank": owners[0],
            "last_rank": owners[-1],
            "_submodules": {number[n]: m for n, m in stack._submodules.items() if n in number},
            **self._solved.setdefault(network.name, {"_solvers": {}, "_learnt": {}}),
        }
        self._outer = {name: stack.__dict__[name] for name in inside}
        stack.__dict__.update(inside)
        if stack.stacked is not None:
            self._rows = stack.stacked.indices
            stack.stacked.indices = tuple(inside["local_indices"])

    def exit(self) -> None:
        self.stack.__dict__.update(self._outer)
        if self.stack.stacked is not None:
            self.stack.stacked.indices = self._rows

    # --- what coarse operators have learnt on the networks, for checkpoints ------------------------------------------

    def learnt(self) -> Iterator[tuple[str, torch.Tensor]]:
        """By network and name in :meth:`LayerParallel.learnt_tensors`."""
        for network, part in self._solved.items():
            for (direction, kind), operator in part["_learnt"].items():
                for name, tensor in operator.tensors():
                    yield f"{network}/{direction}.{kind}.{name}", tensor

    def load_learnt(self, networks: Mapping[str, Network], tensors: Mapping[str, torch.Tensor]) -> None:
        for network in networks.values():
            mine = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{network.name}/")}
            if mine:
                self.enter(network)
                self.stack.load_learnt_tensors({n: t.to(self.stack.comm.device) for n, t in mine.items()})
                self.exit()
