"""The consistency term: what keeps a network's coarse model true while the network is trained.

MGRIT's first iteration is biased by what its coarse steps get wrong. For an interval K of fine layers that begins at
the state u_K, with the first layer's result v and the last one's end, that is e_K = end - Phi_c(u_K, v). The term

    mu mean_K ||e_K||^2 / ||end - u_K||^2

is added to the loss (its gradient alone: no loss that anyone sees has it in). The denominator is a constant of each
pass, and so is u_K, but for the stack's own input: layers learn to be foreseen, not to be placed where that is easy.

It rides on the last sweeps, which know all that it needs. The last forward sweep comes by u_K, v and end. The last
adjoint sweep starts each interval from a value of its own, and what leaves the interval is thrown away: so mu' e_K,
added to that value, reaches the interval's layers alone, and what the coarse step owes to v, -mu' (dPhi_c/dv)^T e_K,
goes to the first layer's product. No layer is evaluated and no message is sent more than without. What is lost is that
the last ranks finish layers in the chain, and layers whose backward comes in two halves keep the input half there: the
last layer of an interval takes one more of these products then. Exact sweeps hand their values on; there the layers of
intervals take one product more, which keeps the term out of what is handed on.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from .._core import Grid
from ..mgrit import vectors
from ..mgrit.layout import Layout
from ..mgrit.learnt_operator import LearntOperator
from ..mgrit.options import MGRIT
from ..state import State

_OPERATORS = ("injection", "scaled", "fitted", "identity")


def check_weight(weight: Any) -> None:
    """Refuses a mu that is none.

    Raises:
        ValueError: naming it.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"consistency = {weight!r}: must be a number of at least 0")


def check_operator(coarse: str) -> None:
    """Refuses coarse operators that have no such term.

    Raises:
        ValueError: naming it.
    """
    if coarse not in _OPERATORS:
        raise ValueError(
            f"consistency is for coarse = {', '.join(_OPERATORS)}, not {coarse!r}, whose coarse step would "
            "have to be differentiated at states where no layer is recorded"
        )


@functools.lru_cache(maxsize=64)
def intervals_of(layout: Layout, options: MGRIT) -> tuple[range, ...]:
    """The intervals of more than one layer, by index in the network; the same on all ranks.

    Raises:
        ValueError: there are none, the coarse operator has no term, or an interval is on several ranks.
    """
    check_operator(options.coarse)
    grid = Grid(layout.depth, options.cfactor, 2)
    points = [grid.position(1, k) for k in range(grid.steps(1) + 1)]
    found = tuple(
        range(layout.open_layers + begin, layout.open_layers + end)
        for begin, end in itertools.pairwise(points)
        if end - begin > 1
    )
    if not found:
        raise ValueError(f"consistency needs intervals of several layers, and there is {layout.depth} to solve for")
    for interval in found:
        ranks = sorted({layout.rank_of(n) for n in interval})
        if len(ranks) > 1:
            raise ValueError(
                f"consistency needs each interval on one rank: layers {interval[0]} to {interval[-1]} are on ranks "
                f"{ranks}. Make the stack with the cfactor that is to be used, in the block layout"
            )
    return found


class ConsistencyTerm:
    """The term of one pass on one rank.

    Args:
        weight: mu.
        layout, options: of the pass.
        operator: the forward coarse operator, where it is one that learns.
        squares: is given for each own interval, by its first layer, ||e_K||^2 and ||end - u_K||^2, scalar tensors;
            summed over the parts of the batch.
    """

    def __init__(
        self,
        weight: float,
        layout: Layout,
        options: MGRIT,
        operator: LearntOperator | None,
        squares: dict[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        intervals = intervals_of(layout, options)
        self.weight, self.count, self.squares = weight, len(intervals), squares
        self.options, self.operator, self.origin = options, operator, layout.open_layers
        self.at_first = {interval[0]: interval for interval in intervals}
        self.at_last = {interval[-1]: interval for interval in intervals}

    def coarse_step(self, interval: range, u: State, v: State) -> State:
        """Phi_c(u_K, v)."""
        if self.options.coarse == "identity":
            return u
        if self.operator is None:
            return vectors.extrapolate(u, v, len(interval))
        return self.operator.step(interval[0] - self.origin, len(interval), u, v)

    def pullback(self, interval: range, e: State) -> State:
        """(dPhi_c/dv)^T e."""
        if self.operator is None:
            factor = 0 if self.options.coarse == "identity" else len(interval)
            return State(t * factor if t.is_floating_point() else t for t in e.tensors)
        return self.operator.pullback(interval[0] - self.origin, len(interval), e)


class ConsistencyPart:
    """The term of one solve forwards and its way back: what the propagators hand through here in their last sweeps.

    Each part of a batch that goes through the layers by itself has its own.
    """

    def __init__(self, term: ConsistencyTerm) -> None:
        self.term = term
        self._begun: dict[int, tuple[State, State]] = {}  # first layer of an interval -> u_K, v
        self._errors: dict[int, tuple[State, State]] = {}  # first layer -> e_K, (dPhi_c/dv)^T e_K
        self._owed: State | None = None  # by exact sweeps, in the interval under way

    # --- forwards ----------------------------------------------------------------------------------------------------

    def see(self, layer: int, before: State, after: State) -> None:
        """A layer's step in the last sweep."""
        if layer in self.term.at_first:
            self._begun[layer] = before, after
        elif (interval := self.term.at_last.get(layer)) is not None:
            self._measure(interval, *self._begun.pop(interval[0]), after)

    def _measure(self, interval: range, u: State, v: State, end: State) -> None:
        with torch.no_grad():
            e = vectors.axpy(-1.0, self.term.coarse_step(interval, u, v), end)
            self._errors[interval[0]] = _floating(e), _floating(self.term.pullback(interval, e))
            pair = _squares(e), _squares(vectors.axpy(-1.0, u, end))
            known = self.term.squares.get(interval[0])
            self.term.squares[interval[0]] = pair if known is None else (known[0] + pair[0], known[1] + pair[1])

    # --- backwards ---------------------------------------------------------------------------------------------------

    def _scale(self, interval: range) -> torch.Tensor:
        size = self.term.squares[interval[0]][1]
        return torch.where(size > 0, 2 * self.term.weight / self.term.count / size, torch.zeros_like(size))

    def added(self, layer: int) -> State | None:
        """What is added to the cotangent that a layer's last product is taken with; None if nothing is."""
        if (interval := self.term.at_last.get(layer)) is not None:
            return _times(self._scale(interval), self._errors[interval[0]][0])
        if (interval := self.term.at_first.get(layer)) is not None:
            return _times(-self._scale(interval), self._errors[layer][1])
        return None

    def left(self, layer: int, cotangent: State) -> State:
        """What a layer's last product gives; the term's gradient for the stack's input is put to it there."""
        if layer != self.term.origin or layer not in self.term.at_first:
            return cotangent
        e, pulled = self._errors[layer]
        owed = _times(-self._scale(self.term.at_first[layer]), vectors.axpy(-1.0, pulled, e))
        return vectors.axpy(1.0, owed, cotangent)

    def observed_from(self, layer: int, start: State) -> State:
        """The value that an interval's products were taken from, for coarse operators of the adjoint to learn."""
        added = self.added(layer) if layer in self.term.at_last else None
        return start if added is None else vectors.axpy(1.0, added, start)

    def exact_step(
        self,
        layer: int,
        cotangent: State,
        input_vjp: Callable[[State], State],
        finish: Callable[[State], State],
    ) -> State:
        """An exact sweep's product with a layer: what is handed on is without the term."""
        owed = self._owed
        if (added := self.added(layer)) is not None:
            owed = added if owed is None else vectors.axpy(1.0, added, owed)
        if owed is None:
            return finish(cotangent)
        if layer == self.term.origin:
            self._owed = None
            return self.left(layer, finish(vectors.axpy(1.0, owed, cotangent)))
        handed_on = input_vjp(cotangent)
        with_term = finish(vectors.axpy(1.0, owed, cotangent))
        self._owed = None if layer in self.term.at_first else vectors.axpy(-1.0, handed_on, with_term)
        return handed_on


def _floating(state: State) -> State:
    return State(t for t in state.tensors if t.is_floating_point())


def _squares(state: State) -> torch.Tensor:
    return torch.stack(
        [torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in _floating(state).tensors]
    ).sum()


def _times(scale: torch.Tensor, state: State) -> State:
    return State(t * scale.to(t.dtype) for t in state.tensors)
