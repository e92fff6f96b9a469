"""The order of the steps: which network takes the next one, and where its training begins and ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from .hierarchy import Network
from .options import MultilevelOptions


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimiser step of a network.

    Attributes:
        path: the networks in training, from below the fine one down to the one that steps; empty for a fine step.
        network: the one that steps.
        fine_step: fine steps before this one, not counting the one whose cycle a coarse step belongs to.
        work: layers that all steps before this one have run, over those of the fine network, rounded down.
        batch: number of the batch.
    """

    path: tuple[Network, ...]
    network: Network
    fine_step: int
    work: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Close:
    """The training of a network ends: it is prolonged to its parent."""

    network: Network


class Schedule:
    """The steps of a whole training, each known once the one before it has been taken.

    A network takes a step and then, for its first ``cycles`` steps, has its coarse networks trained for
    ``coarse_steps`` steps each, which do the same with theirs (a V-cycle that is smoothed on both ways).

    Args:
        fine: the hierarchy.
        options: those of the training.
        total: fine steps.
        cycle_follows: whether a cycle follows a fine step that has been taken, where ``cycles`` is ``"auto"``.
    """

    def __init__(
        self, fine: Network, options: MultilevelOptions, total: int, cycle_follows: Callable[[int], bool]
    ) -> None:
        self.fine, self.options, self.total, self.cycle_follows = fine, options, total, cycle_follows
        self._batch = 0
        self._fine_step = 0
        self._layers_run = 0

    def __iter__(self) -> Iterator[Step | Close]:
        return self._train(self.fine, (), self.total)

    def _train(self, network: Network, path: tuple[Network, ...], steps: int) -> Iterator[Step | Close]:
        for i in range(steps):
            if not path:
                self._fine_step = i
            yield Step(path, network, self._fine_step, self._layers_run // len(self.fine.layers), self._batch)
            self._batch += 1
            self._layers_run += len(network.layers)
            if network.children and self._has_cycle(network, i):
                yield from self._cycle(network, path, i)

    def _has_cycle(self, network: Network, i: int) -> bool:
        cycles = self.options.cycles[network.level]
        return self.cycle_follows(i) if cycles == "auto" else i < cycles

    def _cycle(self, network: Network, path: tuple[Network, ...], i: int) -> Iterator[Step | Close]:
        backwards = self.options.order == "BA" or (self.options.order == "alternating" and i % 2 == 1)
        start = self._batch
        for child in reversed(network.children) if backwards else network.children:
            if self.options.data == "same":
                self._batch = start
            yield from self._train(child, (*path, child), self.options.coarse_steps[network.level])
            yield Close(child)

    # --- what follows is known where the number of cycles is ---------------------------------------------------------

    def steps_by_level(self) -> list[int]:
        """Steps on each level."""
        counts, groups, length = [self.total], 1, self.total
        for level, coarse_steps in enumerate(self.options.coarse_steps):
            groups, length = groups * self._cycles(level, length) * self._children, coarse_steps
            counts.append(groups * length)
        return counts

    def work(self) -> int:
        """All steps in units of fine ones, by the layers that they run."""
        return sum(steps // self.options.networks**level for level, steps in enumerate(self.steps_by_level()))

    def batches(self) -> int:
        """Batches that the steps take."""
        return self._batches(0, self.total)

    def _batches(self, level: int, steps: int) -> int:
        if level == self.options.levels - 1:
            return steps
        groups = 1 if self.options.data == "same" else self._children
        coarse = groups * self._batches(level + 1, self.options.coarse_steps[level])
        return steps + self._cycles(level, steps) * coarse

    @property
    def _children(self) -> int:
        return len(self.fine.children)

    def _cycles(self, level: int, steps: int) -> int:
        """The cycles within so many steps of a network."""
        cycles = self.options.cycles[level]
        if cycles == "auto":
            raise ValueError("cycles = 'auto': how many steps there will be is not known")
        return min(steps, cycles)
