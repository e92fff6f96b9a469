"""Which way to spread a network's layers over ranks is fastest, by a cost model.

Unit: one layer's forward on the whole batch. A layer's input-vjp and its parameter-vjp cost one each, so that a serial
step over N layers costs 3 N. Communication, and what small slices of a batch lose, are left out.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..mgrit.options import MGRIT

_Direction = Literal["forward", "backward"]
# What one exact sweep costs per layer: the forward, or the input-vjp and the parameter-vjp.
_LEAST_SWEEPS: dict[_Direction, int] = {"forward": 1, "backward": 2}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cost of one training step, in layer forwards.

    Attributes:
        serial: one rank, or the exact sweep over any number of ranks; exact gradients.
        pipeline: slices of the batch streamed through the ranks (GPipe or 1F1B: the same bubble); exact gradients.
        layer_parallel: MGRIT with the options given.
    """

    serial: float
    pipeline: float
    layer_parallel: float

    @property
    def fastest(self) -> str:
        """The attribute with the lowest cost; of equal ones the simplest."""
        costs = dataclasses.asdict(self)
        return min(costs, key=costs.__getitem__)


def plan(
    layers: int,
    ranks: int,
    options: MGRIT,
    *,
    buffers: int = 0,
    microbatches: int = 1,
    layout: str = "block",
    chain_slices: int = 1,
) -> Plan:
    """The cost of each way for generic modules (blocks without a split backward).

    A coarse step costs one layer, also with the small products of ``scaled`` and ``fitted``; that of ``sum`` costs all
    the layers it spans, at once in the cyclic layout, one after the other in the block layout.

    Args:
        layers: N, buffer layers included.
        ranks: P.
        options: of the solver.
        buffers: open and close layers, swept serially.
        microbatches: slices of the batch that the pipeline streams.
        layout: ``"block"`` or ``"cyclic"``.
        chain_slices: slices of the batch that coarse sweeps go through the ranks in (block layout).

    Raises:
        ValueError: a layout that these options or ranks do not allow.
    """
    if layout == "cyclic" and not options.exact:
        if options.coarse != "sum" or options.levels > 2 or options.relaxation != "F":
            raise ValueError(f"layout = 'cyclic' is for coarse = 'sum', 2 levels and F-relaxation, not {options}")
        if ranks % options.cfactor and options.cfactor % ranks:
            raise ValueError(
                f"layout = 'cyclic': ranks = {ranks} must divide cfactor = {options.cfactor} or be a multiple of it"
            )
    p = min(ranks, layers)
    pipeline = 3 * layers * ((1 - 1 / p) / microbatches + 1 / p)
    depth = layers - buffers
    cost = 3.0 * buffers
    for direction, least in _LEAST_SWEEPS.items():
        if options.iterations(direction) == 0:
            cost += least * depth
        elif layout == "cyclic":
            cost += _cyclic(depth, ranks, options, direction, least)
        else:
            cost += _block(depth, ranks, options, direction, least, chain_slices)
    return Plan(3.0 * layers, pipeline, cost)


def _block(depth: int, ranks: int, options: MGRIT, direction: _Direction, least: int, slices: int) -> float:
    p = min(ranks, -(-depth // options.cfactor) if options.levels > 1 else depth)
    iterations, fcf = options.iterations(direction), options.relaxation == "FCF"
    sweeps = iterations + least - 1 + (iterations - 1 if fcf else 0)
    # A rank starts its sweep as soon as the coarse chain has passed it, so the chain counts for the others only.
    hops = p - 1.0
    if direction == "backward":
        # At C-points the last sweep repeats the input-vjp that the chain has taken, but on the ranks from `first` on,
        # whose chain takes the whole product at once; see finishes_on_chain in csrc/block_solve.cpp.
        first = max(0, (2 * p - slices) // 2)
        hops = max(first - 1 + slices if first else 0, 2 * (p - 1) - first)
    cost = _chain(depth, options) * hops / p / slices + sweeps * depth / p
    if options.coarse == "sum":
        # Of the layers that a coarse step spans the fine sweep uses one again. A rank waits for the first chain of all;
        # each further iteration takes its own steps twice, at the old states and at the new ones.
        others = depth * (1 - 1 / options.cfactor)
        cost += others + (iterations - 1) * 2 * others / p
    return cost


def _cyclic(depth: int, ranks: int, options: MGRIT, direction: _Direction, least: int) -> float:
    """The coarse chain at one layer a step, then the fine sweep as a pipeline over the group that has to fill."""
    group = min(ranks, options.cfactor)
    fill = ((group - 1) * least - 0.5) * options.cfactor / group
    further = (options.iterations(direction) - 1) * 2 * depth / ranks
    return depth / group + least * depth / ranks + fill + further


def _chain(depth: int, options: MGRIT) -> float:
    """Coarse steps one after the other: all of the coarsest level, one interval of each level in between."""
    return depth / options.cfactor ** (options.levels - 1) + options.cfactor * (options.levels - 2)
