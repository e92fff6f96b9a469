"""A training step of a layer-parallel stack, event by event: when each rank is done with what, and what it waits for.

A rank's time goes by the layers it owns (:mod:`mlpint.mgrit.layout`), so that intervals that ranks do not share evenly
count. Coarse sweeps go through the ranks in slices of the batch: rank r takes slice s once it has the state of rank
r - 1 and is through with slice s - 1. Everything else is done on the whole batch, by all ranks at once. In the cyclic
layout and with more than two levels the times are those of a formula for layers that are shared evenly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np

from ..mgrit.layout import Layout
from ..mgrit.options import MGRIT

_Direction = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the parts of a step take, in any unit of time; by default a layer's forward is 1 and messages are free.

    Attributes:
        forward, input_vjp, combined_vjp: of one layer on the whole batch; the last gives input and weights at once.
        slices: m -> what an m-th of the batch takes against an m-th of the time of all of it; 1 where not given.
        latency: of a message.
        transfer: of the state of the whole batch, beside the latency.
        head: forward and backward of what lies outside the stack, on the whole batch.
    """

    forward: float = 1.0
    input_vjp: float = 1.0
    combined_vjp: float = 2.0
    slices: Mapping[int, float] = dataclasses.field(default_factory=dict)
    latency: float = 0.0
    transfer: float = 0.0
    head: float = 0.0

    def part(self, m: int) -> float:
        """What an m-th of the batch takes, as a part of what all of it takes."""
        known = [k for k in self.slices if k <= m]
        return self.slices[max(known)] / m if known and m > 1 else 1 / m

    def hop(self, m: int = 1) -> float:
        """A message with an m-th of the batch."""
        return self.latency + self.transfer / m

    @property
    def serial(self) -> float:
        """A layer's forward and backward."""
        return self.forward + self.combined_vjp


@dataclasses.dataclass(frozen=True)
class Ownership:
    """What each rank that has layers owns, in the order of the layers.

    Attributes:
        intervals, layers: how many.
        last: layers of the last interval.
    """

    intervals: tuple[int, ...]
    layers: tuple[int, ...]
    last: int


@functools.lru_cache(maxsize=1024)
def ownership(depth: int, ranks: int, cfactor: int) -> Ownership:
    """Of the layers that are solved for, in the block layout."""
    layers = tuple(Counter(Layout.deal("block", depth, ranks, MGRIT(2, cfactor)).owners).values())
    intervals = tuple(-(-n // cfactor) for n in layers)
    return Ownership(intervals, layers, depth - (sum(intervals) - 1) * cfactor)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Attributes:
    time: of a step, on the slowest rank.
    busy: the time that all ranks together evaluate layers for.
    """

    time: float
    busy: float


def layer_parallel(
    depth: int,
    ranks: int,
    options: MGRIT,
    costs: Costs,
    *,
    buffers: int = 0,
    layout: str = "block",
    chain_slices: int = 1,
) -> StepTime:
    """One forward and backward, the head between them included.

    Args:
        depth: layers that are solved for.
        buffers: open and close layers, swept serially.
    """
    time, busy = buffers * costs.serial + costs.head + 2 * _broadcast(ranks, costs), buffers * costs.serial
    for direction in ("forward", "backward"):
        part = _direction(direction, depth, ranks, options, costs, layout, chain_slices)
        time, busy = time + part.time, busy + part.busy
    return StepTime(time, busy)


def pipeline(layers: int, ranks: int, costs: Costs, microbatches: int) -> StepTime:
    """Exact sweeps of slices of the batch one behind the other (GPipe or 1F1B: the same bubble), the head included."""
    share, turns = -(-layers // ranks), microbatches + ranks - 1
    hops = 2 * turns * costs.hop(microbatches) if ranks > 1 else 0.0
    time = turns * share * costs.serial * costs.part(microbatches) + hops + costs.head + 2 * _broadcast(ranks, costs)
    return StepTime(time, layers * costs.serial * microbatches * costs.part(microbatches))


def _broadcast(ranks: int, costs: Costs) -> float:
    """The last state to all ranks; so with the gradient for the first."""
    return math.ceil(math.log2(ranks)) * costs.hop() if ranks > 1 else 0.0


def _direction(
    direction: _Direction, depth: int, ranks: int, options: MGRIT, costs: Costs, layout: str, slices: int
) -> StepTime:
    one = costs.forward if direction == "forward" else costs.input_vjp
    whole = costs.forward if direction == "forward" else costs.combined_vjp
    if options.iterations(direction) == 0:
        return StepTime(depth * whole + (min(ranks, depth) - 1) * costs.hop(), depth * whole)
    if layout == "cyclic":
        return _cyclic(one, whole, depth, ranks, options, options.iterations(direction), costs)
    if options.levels > 2:
        return _many_levels(one, whole, depth, ranks, options, options.iterations(direction), costs, slices)
    own = ownership(depth, ranks, options.cfactor)
    counts, layers, last = np.array(own.intervals, float), np.array(own.layers, float), own.last
    if direction == "backward":
        counts, layers, last = counts[::-1], layers[::-1], min(options.cfactor, depth)
    return _two_levels(direction, one, whole, counts, layers, last, options, costs, slices)


def _two_levels(
    direction: _Direction,
    one: float,
    whole: float,
    counts: np.ndarray,
    layers: np.ndarray,
    last_interval: int,
    options: MGRIT,
    costs: Costs,
    m: int,
) -> StepTime:
    """Ranks in the order in which the sweep of a direction goes through them.

    one, whole: what an evaluation takes that others wait for, and one of the last sweep.
    """
    ranks, iterations = len(counts), options.iterations(direction)
    m = m if ranks > 1 else 1
    reused = 0 * counts if options.coarse == "identity" else counts  # fine steps that the chain takes on its way
    spans = layers if options.coarse == "sum" else reused
    finishes = np.zeros(ranks, bool)
    if direction == "backward" and options.coarse != "identity":
        # The last ranks of the adjoint take whole products in the chain; see finishes_on_chain in csrc/block_solve.cpp.
        finishes = np.arange(ranks) >= max(0, (2 * ranks - m) // 2)
    now, busy, left_out = np.zeros(ranks), 0.0, 0.0
    for iteration in range(1, iterations + 1):
        last = iteration == iterations
        turn = spans * one + last * finishes * counts * (whole - one)
        # The coarse step onto the last point is left out: nothing is computed from it. With slices its fine step is
        # taken all the same, for the time until the next slice comes.
        left_out = turn[-1] / counts[-1] if m == 1 or not last else 0.0
        turn[-1] -= left_out
        now, busy = _chain(now, turn * costs.part(m), costs.hop(m), m), busy + turn.sum() * m * costs.part(m)
        if not last:
            # Relaxation, but not of the last interval, whose end is nobody's right-hand side.
            relaxed = layers - reused
            relaxed[-1] -= last_interval - (options.coarse != "identity")
            between = relaxed * one * (2 if options.relaxation == "FCF" else 1)
            if options.coarse == "sum":
                between = between + relaxed * one  # the coarse steps at the old states, for the right-hand sides
            now, busy = now + between, busy + between.sum()
    rest = (layers - reused * (finishes if direction == "backward" else 1)) * whole
    if left_out and (direction == "forward" or finishes[-1]):
        rest[-1] += whole
    return StepTime(float((now + rest).max()), float(busy + rest.sum()))


def _chain(ready: np.ndarray, turn: np.ndarray, hop: float, m: int) -> np.ndarray:
    """When each rank is through with its last slice."""
    # done_r = max(done_(r-1) + hop, done_r of the slice before) + turn_r, written out over r.
    through = np.cumsum(turn) + hop * np.arange(len(turn))
    done = ready
    for _ in range(m):
        done = through + np.maximum.accumulate(done - (through - turn))
    return done


def _cyclic(
    one: float, whole: float, depth: int, ranks: int, options: MGRIT, iterations: int, costs: Costs
) -> StepTime:
    """The coarse chain at one layer a step, then the fine sweep as a pipeline over the group that has to fill."""
    group = min(ranks, options.cfactor)
    fill = ((group - 1) * whole - 0.5 * one) * options.cfactor / group
    further = (iterations - 1) * 2 * one * depth
    hops = (depth / options.cfactor + group) * costs.hop() * (ranks > 1)
    time = one * depth / group + whole * depth / ranks + fill + further / ranks + hops
    return StepTime(time, one * depth + whole * depth + further)


def _many_levels(
    one: float, whole: float, depth: int, ranks: int, options: MGRIT, iterations: int, costs: Costs, m: int
) -> StepTime:
    """Coarse steps one after the other: all of the coarsest level, one interval of each level in between."""
    p = min(ranks, -(-depth // options.cfactor))
    again = one / options.cfactor if whole > one else 0.0  # the last sweep repeats what the chain has taken
    work = depth * ((iterations - 1) * one * (2 if options.relaxation == "FCF" else 1) + whole + again)
    chain = depth / options.cfactor ** (options.levels - 1) + options.cfactor * (options.levels - 2)
    m = m if p > 1 else 1
    waits = chain * one * (p - 1) / p * costs.part(m) + (p - 1 + m - 1) * costs.hop(m) * (p > 1)
    return StepTime(waits + work / p, work)
