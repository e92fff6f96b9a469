"""Which way to spread a network's layers over ranks is fastest, by a cost model.

Unit: one layer's forward on the whole batch. A layer's input-vjp and its parameter-vjp cost one each, so that a serial
step over N layers costs 3 N. Communication, and what small slices of a batch lose, are left out.
"""

from __future__ import annotations

import dataclasses

from .options import MGRIT


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


def plan(layers: int, ranks: int, options: MGRIT, *, buffers: int = 0, microbatches: int = 1) -> Plan:
    """The cost of each way for generic modules (blocks without a split backward) and coarse steps of one layer.

    Args:
        layers: N, buffer layers included.
        ranks: P.
        options: of the solver.
        buffers: open and close layers, swept serially.
        microbatches: slices of the batch that the pipeline streams.
    """
    p = min(ranks, layers)
    pipeline = 3 * layers * ((1 - 1 / p) / microbatches + 1 / p)
    depth = layers - buffers
    p = min(ranks, -(-depth // options.cfactor) if options.levels > 1 else depth)
    cost = 3.0 * buffers
    for direction, least in (("forward", 1), ("backward", 2)):
        iterations = options.iterations(direction)
        if iterations == 0:
            cost += least * depth
            continue
        sweeps = iterations + least - 1 + (iterations - 1 if options.relaxation == "FCF" else 0)
        # A rank starts its sweep as soon as the coarse chain has passed it, so the chain counts for the others only.
        cost += _chain(depth, options) * (1 - 1 / p) + sweeps * depth / p
        if direction == "backward":  # at C-points the last sweep repeats the input-vjp that the chain has taken
            cost += depth / options.cfactor / p
    return Plan(3.0 * layers, pipeline, cost)


def _chain(depth: int, options: MGRIT) -> float:
    """Coarse steps one after the other: all of the coarsest level, one interval of each level in between."""
    return depth / options.cfactor ** (options.levels - 1) + options.cfactor * (options.levels - 2)
