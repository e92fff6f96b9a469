"""The networks of a hierarchy: which layers each has, and how long its steps are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

FINE = "fine"


@dataclasses.dataclass(frozen=True)
class Network:
    """A network made of some of the layers.

    Attributes:
        name: ``"fine"``, ``"A"``, ``"B"``, ..., and on deeper levels ``"AA"``, ``"AB"``, ...
        level: 0 for the fine network.
        layers: their indices, ascending, without the layers that every network has.
        stretch: length of its steps over the fine network's.
        ratio: length of its steps over its parent's.
        stands_for: for each layer the layers of the parent that it stands for beside itself.
        children: its own coarse networks, A first.
    """

    name: str
    level: int
    layers: tuple[int, ...]
    stretch: float
    ratio: float
    stands_for: tuple[tuple[int, ...], ...]
    children: tuple[Network, ...] = ()

    def walk(self) -> Iterator[Network]:
        """The network and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def hierarchy(layers: Sequence[int], networks: int, levels: int, ode: bool, single: bool) -> Network:
    """The fine network with its coarse ones.

    Coarse network k of c takes of every c layers in a row the one at place c - 1 - k: of two, A the blocks 2, 4, ...
    and B the blocks 1, 3, ... counted from one, as arXiv 2504.18590, section 3, has them.

    Args:
        layers: indices of the layers to be dealt out.
        networks: c, coarse networks of each network.
        levels: of the hierarchy, 2 for one coarse level.
        ode: whether steps of the coarse networks are c times as long (x + 2 F) or the same (x + F).
        single: only A.

    Raises:
        ValueError: the number of layers cannot be dealt out evenly.
    """
    count, part = len(layers), networks ** (levels - 1)
    if count < part or count % part:
        below, above = count // part * part, -(-count // part) * part
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"{count} layers cannot be split evenly into {networks} coarse networks on each of {levels - 1} coarse "
            f"level{'s' if levels > 2 else ''}: their number must be a multiple of {part}; take {nearest} layers, or "
            "another number of networks or levels"
        )
    ratio = float(networks) if ode else 1.0
    fine = Network(FINE, 0, tuple(layers), 1.0, 1.0, ((),) * count)
    return _with_children(fine, networks, levels, ratio, single)


def _with_children(parent: Network, networks: int, levels: int, ratio: float, single: bool) -> Network:
    if parent.level == levels - 1:
        return parent
    children = []
    for k in range(1 if single else networks):
        place = networks - 1 - k
        groups = [parent.layers[i : i + networks] for i in range(0, len(parent.layers), networks)]
        child = Network(
            name=("" if parent.level == 0 else parent.name) + chr(ord("A") + k),
            level=parent.level + 1,
            layers=tuple(group[place] for group in groups),
            stretch=parent.stretch * ratio,
            ratio=ratio,
            stands_for=tuple(tuple(n for n in group if n != group[place]) for group in groups),
        )
        children.append(_with_children(child, networks, levels, ratio, single))
    return dataclasses.replace(parent, children=tuple(children))
