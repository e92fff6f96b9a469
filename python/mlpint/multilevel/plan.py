"""The order of the steps: which network takes the next one, and where its training begins and ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from .hierarchy import Network
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimiser step of a network.

    Attributes:
        path: the networks in training, from below the fine one down to the one that steps; empty for a fine step.
        network: the one that steps.
        fine_step: fine steps before this one, not counting the one whose cycle a coarse step belongs to.
        own_step: steps on this network's level before this one.
        work: layers that all steps before this one have run, over those of the fine network, rounded down.
        group_step: steps of this network since its training began last.
        batch: number of the batch.
    """

    path: tuple[Network, ...]
    network: Network
    fine_step: int
    own_step: int
    work: int
    group_step: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Close:
    """The training of a network ends: it is prolonged to its parent."""

    network: Network


class Plan:
    """The steps of a whole training, each known once the one before it has been taken.

    A network takes a step and then, for its first ``cycles`` steps, has its coarse networks trained for
    ``coarse_steps`` steps each, which do the same with theirs (a V-cycle that is smoothed on both ways).

    Args:
        fine: the hierarchy.
        settings: its options.
        total: fine steps.
        another: says of a fine step that has been taken whether a cycle follows, where ``cycles`` is ``"auto"``.
    """

    def __init__(self, fine: Network, settings: Settings, total: int, another: Callable[[int], bool]) -> None:
        self.fine, self.settings, self.total, self.another = fine, settings, total, another
        self._batch = 0
        self._fine_step = 0
        self._own = [0] * settings.levels
        self._layers_run = 0

    def __iter__(self) -> Iterator[Step | Close]:
        return self._train(self.fine, (), self.total)

    def _train(self, network: Network, path: tuple[Network, ...], steps: int) -> Iterator[Step | Close]:
        for i in range(steps):
            if not path:
                self._fine_step = i
            work = self._layers_run // len(self.fine.layers)
            yield Step(path, network, self._fine_step, self._own[network.level], work, i, self._batch)
            self._batch += 1
            self._layers_run += len(network.layers)
            self._own[network.level] += 1
            if network.children and self._cycles(network, i):
                yield from self._cycle(network, path, i)

    def _cycles(self, network: Network, i: int) -> bool:
        if network.level == 0 and self.settings.adaptive:
            return self.another(i)
        return i < self.settings.cycles[network.level]

    def _cycle(self, network: Network, path: tuple[Network, ...], i: int) -> Iterator[Step | Close]:
        backwards = self.settings.order == "BA" or (self.settings.order == "alternating" and i % 2 == 1)
        start = self._batch
        for child in reversed(network.children) if backwards else network.children:
            if self.settings.data == "same":
                self._batch = start
            yield from self._train(child, (*path, child), self.settings.coarse_steps[network.level])
            yield Close(child)

    def steps_by_level(self) -> list[int]:
        """Steps on each level; where the number of cycles is known."""
        children = 1 if self.settings.single else self.settings.networks
        counts, groups, length = [self.total], 1, self.total
        for cycles, coarse_steps in zip(self.settings.cycles, self.settings.coarse_steps, strict=True):
            groups, length = groups * min(length, cycles) * children, coarse_steps
            counts.append(groups * length)
        return counts

    def work(self) -> int:
        """All steps in units of fine ones, by the layers that they run; where the number of cycles is known."""
        parts = (steps // self.settings.networks**level for level, steps in enumerate(self.steps_by_level()))
        return sum(parts)

    def batches(self) -> int:
        """Batches that the steps take; where the number of cycles is known."""
        return self._batches(0, self.total)

    def _batches(self, level: int, steps: int) -> int:
        if level == self.settings.levels - 1:
            return steps
        children = 1 if self.settings.single or self.settings.data == "same" else self.settings.networks
        coarse = children * self._batches(level + 1, self.settings.coarse_steps[level])
        return steps + min(steps, self.settings.cycles[level]) * coarse
