"""Layers evaluated slice by slice where a chain through the ranks takes the batch in slices."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .._core import Grid
from ..mgrit.layout import Layout
from ..mgrit.options import MGRIT
from ..state import State
from .batch_slices import BatchSlices
from .divided_evaluator import DividedEvaluator, Known, Step
from .evaluator import LayerEvaluator


class SlicedEvaluator(DividedEvaluator):
    """As :class:`mlpint.layers.evaluator.LayerEvaluator`, for layers that a chain evaluates in slices.

    Such a layer is evaluated in slices in every sweep: what one slice has recorded can be differentiated without the
    others, and its random numbers are those of the slice, whoever asks. The other layers take the whole batch.

    Args:
        whole: evaluates the whole batch.
        parts: evaluate a slice each.
        slices: how the batch is cut.
        chained: the layers that a chain evaluates.
    """

    def __init__(
        self, whole: LayerEvaluator, parts: Sequence[LayerEvaluator], slices: BatchSlices, chained: Collection[int]
    ) -> None:
        self.whole, self.parts, self.slices, self.chained = whole, parts, slices, chained
        self.gradients = whole.gradients
        for part in parts:
            part.gradients = whole.gradients
        super().__init__(whole)

    @property
    def finishes_on_chain(self) -> bool:
        return self.whole.finishes_on_chain

    def _divide(self, layers: Sequence[int], states: Sequence[State], known: Known, step: Step) -> list[State]:
        whole = [j for j, n in enumerate(layers) if n not in self.chained]
        results = self._stepped(self.whole, whole, layers, states, known, step)
        chained = [j for j, n in enumerate(layers) if n in self.chained]
        if chained:
            pieces = []
            for i, part in enumerate(self.parts):
                self._active = part
                own = [self.slices.slice(states[j], i) for j in chained]
                own_known = [None if k is None else self.slices.slice(k, i) for k in (known[j] for j in chained)]
                pieces.append(step(part, [layers[j] for j in chained], own, own_known))
            results.update({j: self.slices.join([p[place] for p in pieces]) for place, j in enumerate(chained)})
        return [results[j] for j in range(len(layers))]


def chained_layers(layout: Layout, options: MGRIT) -> frozenset[int]:
    """The layers that are evaluated in what goes serially from rank to rank: coarsest level or exact sweep."""
    chained: set[int] = set()
    for direction in ("forward", "backward"):
        grid = Grid(layout.depth, options.cfactor, options.levels)
        positions: list[int] = []
        if options.iterations(direction) == 0:
            positions = list(range(layout.depth))
        elif options.coarse != "identity":
            grid = grid if direction == "forward" else grid.mirrored()
            coarsest = grid.levels - 1
            for k in range(grid.steps(coarsest)):
                start = grid.position(coarsest, k)
                spanned = grid.length(coarsest, k) if options.coarse == "sum" else 1
                positions += range(start, start + spanned)
        first, last = layout.open_layers, layout.open_layers + layout.depth - 1
        chained.update(first + p if direction == "forward" else last - p for p in positions)
    return frozenset(chained)
