"""Which rank owns which layer."""

from __future__ import annotations

import bisect

from .._core import Partition


def block_owners(depth: int, granularity: int, ranks: int) -> list[int]:
    """Owner of each layer in the block layout: consecutive layers, whole intervals of ``granularity`` layers dealt out
    evenly, the earlier ranks taking what is left over. With fewer intervals than ranks the last ranks own nothing."""
    partition = Partition(Partition.even(depth, granularity, ranks), depth)
    return [partition.owner(position) for position in range(depth)]


def cyclic_owners(depth: int, cfactor: int, ranks: int) -> list[int]:
    """Owner of each layer in the cyclic layout: the intervals are dealt evenly to groups of at most cfactor ranks, and
    the layers of an interval evenly, in order, to the ranks of its group."""
    group = min(ranks, cfactor)
    groups, intervals = ranks // group, -(-depth // cfactor)
    ends = [g * intervals // groups for g in range(1, groups + 1)]
    owners = []
    for position in range(depth):
        interval, place = divmod(position, cfactor)
        owners.append(group * bisect.bisect_right(ends, interval) + place * group // cfactor)
    return owners


def partition_of(owners: list[int], ranks: int) -> Partition:
    """The solver's form of a block layout."""
    return Partition([bisect.bisect_left(owners, rank) for rank in range(ranks + 1)], len(owners))
