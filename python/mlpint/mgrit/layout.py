"""Which rank owns which layer of a stack, and how long a layer's step is."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable
from functools import cached_property

from .._core import Partition
from .options import MGRIT

KINDS = ("block", "cyclic")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layers of a network and their ranks. Open and close layers are the first and last rank's.

    Attributes:
        kind: ``"block"`` or ``"cyclic"``; see :class:`mlpint.LayerParallel`.
        layers: for each layer of the network its index in the whole stack: 0, 1, ... unless some were selected.
        owners: the rank of each layer that is solved for, those between the open and the close layers.
        ranks: how many ranks there are.
        open_layers, close_layers: how many first and last layers are swept serially, at step size 1.
        step_size: h of the layers that are solved for.
    """

    kind: str
    layers: tuple[int, ...]
    owners: tuple[int, ...]
    ranks: int
    open_layers: int = 0
    close_layers: int = 0
    step_size: float = 1.0

    @classmethod
    def deal(
        cls,
        kind: str,
        layers: int,
        ranks: int,
        options: MGRIT,
        open_layers: int = 0,
        close_layers: int = 0,
        step_size: float = 1.0,
    ) -> Layout:
        """Deals so many layers out to so many ranks.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        if kind not in KINDS:
            raise ValueError(f"layout = {kind!r}: must be 'block' or 'cyclic'")
        if kind == "cyclic" and ranks % options.cfactor and options.cfactor % ranks:
            raise ValueError(
                f"layout='cyclic' deals the {options.cfactor} layers of an interval out to ranks: their number, "
                f"{ranks}, must be a multiple of cfactor or divide it"
            )
        for name, value in (("open_layers", open_layers), ("close_layers", close_layers)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} = {value!r}: must be an integer of at least 0")
        depth = layers - open_layers - close_layers
        if depth <= 0:
            raise ValueError(
                f"open_layers + close_layers = {open_layers} + {close_layers} leaves none of the {layers} layers to "
                "the solver"
            )
        if isinstance(step_size, bool) or not isinstance(step_size, int | float) or not step_size > 0:
            raise ValueError(f"step_size = {step_size!r}: must be a positive number")
        if kind == "block":
            owners = _block_owners(depth, interval(options), ranks)
        else:
            owners = _cyclic_owners(depth, options.cfactor, ranks)
        return cls(kind, tuple(range(layers)), tuple(owners), ranks, open_layers, close_layers, step_size)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def depth(self) -> int:
        """How many layers are solved for."""
        return len(self.owners)

    @property
    def first_rank(self) -> int:
        """The owner of the first layer."""
        return self.owners[0]

    @property
    def last_rank(self) -> int:
        """The owner of the last layer."""
        return self.owners[-1]

    @property
    def open_indices(self) -> range:
        return range(self.open_layers)

    @property
    def close_indices(self) -> range:
        return range(len(self) - self.close_layers, len(self))

    def rank_of(self, layer: int) -> int:
        """The rank that owns a layer."""
        return self.owners[min(max(layer - self.open_layers, 0), self.depth - 1)]

    def step_size_of(self, layer: int) -> float:
        """h of a layer; 1 for open and close layers."""
        return self.step_size if 0 <= layer - self.open_layers < len(self.owners) else 1

    def local_indices(self, rank: int) -> tuple[int, ...]:
        """The layers of a rank."""
        return tuple(n for n in range(len(self)) if self.rank_of(n) == rank)

    @cached_property
    def idle_ranks(self) -> list[int]:
        """Ranks without layers of their own: there are fewer intervals of cfactor layers than ranks."""
        return sorted({*range(self.ranks)} - {*self.owners})

    def select(self, layers: Iterable[int], stretch: float) -> Layout:
        """The layout of a network made of some of the layers, which stay with their ranks and are numbered anew.

        Args:
            layers: indices of those that are solved for; open and close layers belong to every network.
            stretch: how many times as long its steps are.
        """
        solved = sorted(layers)
        return dataclasses.replace(
            self,
            layers=tuple(self.layers[n] for n in (*self.open_indices, *solved, *self.close_indices)),
            owners=tuple(self.rank_of(n) for n in solved),
            step_size=self.step_size * stretch,
        )

    def partition(self) -> Partition:
        """The solver's form of a block layout."""
        return Partition([bisect.bisect_left(self.owners, rank) for rank in range(self.ranks + 1)], self.depth)


def interval(options: MGRIT) -> int:
    """How many layers stay together on a rank of the block layout."""
    return options.cfactor if options.levels > 1 else 1


def _block_owners(depth: int, granularity: int, ranks: int) -> list[int]:
    """Consecutive layers: whole intervals of ``granularity`` layers are dealt out evenly, the earlier ranks taking what
    is left over. With fewer intervals than ranks the last ranks own nothing."""
    partition = Partition(Partition.even(depth, granularity, ranks), depth)
    return [partition.owner(position) for position in range(depth)]


def _cyclic_owners(depth: int, cfactor: int, ranks: int) -> list[int]:
    """The intervals are dealt evenly to groups of at most cfactor ranks, and the layers of an interval evenly, in
    order, to the ranks of its group."""
    group = min(ranks, cfactor)
    groups, intervals = ranks // group, -(-depth // cfactor)
    ends = [g * intervals // groups for g in range(1, groups + 1)]
    owners = []
    for position in range(depth):
        number, place = divmod(position, cfactor)
        owners.append(group * bisect.bisect_right(ends, number) + place * group // cfactor)
    return owners
