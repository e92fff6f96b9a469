"""The ways to spread a network and its batch over ranks, each with what it should cost: replicas, pipelines, MGRIT."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from ..mgrit.layout import Layout
from ..mgrit.options import MGRIT
from .quality import expected_cosine
from .simulation import Costs, StepTime, layer_parallel, ownership, pipeline

_SLICES = (1, 2, 4, 8, 16, 32, 64)
_SOLVERS: tuple[tuple[Literal["injection", "fitted", "sum"], str, bool], ...] = (
    ("injection", "block", True),  # with the consistency term
    ("fitted", "block", False),
    ("sum", "block", False),
    ("sum", "cyclic", False),
)
_STATES = 4  # a weight, its gradient and AdamW's two averages


@dataclasses.dataclass(frozen=True)
class Network:
    """What is to be trained.

    Attributes:
        layers: open and close layers included.
        open_layers, close_layers: swept serially.
        batch: samples of a step, of all replicas together.
        layer_bytes, outside_bytes: parameters of one layer, and of what lies outside the stack.
        sample_bytes: what one layer keeps of one sample for its backward.
    """

    layers: int
    open_layers: int = 0
    close_layers: int = 0
    batch: int = 8
    layer_bytes: int = 0
    outside_bytes: int = 0
    sample_bytes: int = 0

    @property
    def depth(self) -> int:
        return self.layers - self.open_layers - self.close_layers


@dataclasses.dataclass(frozen=True)
class Way:
    """How ranks are used.

    Attributes:
        replicas, ranks: D, and the ranks that share the layers of one.
        options: of the solver; exact for serial sweeps and pipelines.
        slices: of a replica's batch, in coarse sweeps or in the pipeline.
        layout: of the layers.
        consistency: whether the network is trained with the consistency term.
    """

    replicas: int = 1
    ranks: int = 1
    options: MGRIT = dataclasses.field(default_factory=lambda: MGRIT(levels=1))
    slices: int = 1
    layout: str = "block"
    consistency: bool = False

    @property
    def name(self) -> str:
        replicas = f"{self.replicas} replicas" if self.replicas > 1 else ""
        if self.ranks == 1:
            return replicas or "serial"
        o = self.options
        how = f"pipeline, {self.slices} microbatches" if self.slices > 1 else "one rank after the other"
        if not o.exact:
            how = f"({o.forward_iters},{o.backward_iters}) cf {o.cfactor} {o.coarse}"
            how += f", {o.levels} levels" if o.levels > 2 else ""
            how += ", cyclic" if self.layout == "cyclic" else f", {self.slices} slices" if self.slices > 1 else ""
            how += ", consistency 1" if self.consistency else ""
        return f"{replicas} of {self.ranks} ranks: {how}" if replicas else how

    @property
    def flags(self) -> str:
        """Of ``mlpint train``, beside those of the network."""
        o, flags = self.options, []
        if self.replicas > 1:
            flags.append(f"--data-parallel {self.replicas}")
        if o.exact:
            flags.append("--levels 1")
            flags += [f"--serial-microbatches {self.slices}"] * (self.slices > 1)
        else:
            flags.append(f"--coarse {o.coarse} --cfactor {o.cfactor}")
            flags.append(f"--forward-iters {o.forward_iters} --backward-iters {o.backward_iters}")
            flags += [f"--levels {o.levels}"] * (o.levels > 2)
            flags += [f"--relaxation {o.relaxation}"] * (o.relaxation != "F")
            flags += [f"--chain-slices {self.slices}"] * (self.slices > 1)
            flags += ["--layout cyclic"] * (self.layout == "cyclic")
            flags += [f"--consistency {int(self.consistency)}"] * (o.coarse == "injection")
        return " ".join(flags)


@dataclasses.dataclass(frozen=True)
class Priced:
    """What a way should cost.

    Attributes:
        time: of a step, in the unit of the costs.
        bubble: share of the ranks' time in which they evaluate no layers.
        memory: bytes of the fullest rank: weights, gradients, optimiser, what layers keep for their backward.
        cosine: of the gradients to the exact ones, as measured elsewhere; None where it was not.
        idle: ranks of each replica without layers.
    """

    way: Way
    time: float
    bubble: float
    memory: int
    cosine: float | None
    idle: int


def price(way: Way, network: Network, costs: Costs, sync: float = 0.0, bandwidth_time: float = 0.0) -> Priced:
    """Simulates a step.

    Args:
        costs: on the whole batch of all replicas together.
        sync: latency of a message between replicas.
        bandwidth_time: what a byte takes there.

    Raises:
        ValueError: more slices or replicas than samples, ranks that a layout does not allow.
    """
    samples = network.batch // way.replicas
    if samples < way.slices:
        raise ValueError(
            f"{way.slices} slices of the batch, which has {samples} samples for each of {way.replicas} replicas (batch "
            f"= {network.batch})"
        )
    own = _of_replica(costs, way.replicas)
    if way.options.exact:
        step = pipeline(network.layers, way.ranks, own, way.slices)
        most, idle = -(-network.layers // way.ranks), 0
    else:
        step, most, idle = _solved(way, network, own)
    stored = most * network.layer_bytes + network.outside_bytes
    time = step.time
    if way.replicas > 1:
        # Each rank sends and receives its gradients twice, but for its own part.
        time += 2 * sync + 2 * (1 - 1 / way.replicas) * stored * bandwidth_time
    kept = most * network.sample_bytes * samples
    bubble = 1 - step.busy / (way.ranks * step.time) if step.time else 0.0
    cosine = expected_cosine(way.options, way.consistency)
    return Priced(way, time, max(bubble, 0.0), _STATES * stored + kept, cosine, idle)


def _of_replica(costs: Costs, replicas: int) -> Costs:
    if replicas == 1:
        return costs
    part = costs.part(replicas)
    slices = {m: costs.part(replicas * m) * m / part for m in costs.slices}
    return Costs(
        costs.forward * part,
        costs.input_vjp * part,
        costs.combined_vjp * part,
        slices,
        costs.latency,
        costs.transfer / replicas,
        costs.head / replicas,
    )


def _solved(way: Way, network: Network, costs: Costs) -> tuple[StepTime, int, int]:
    """The step, the layers of the rank with most of them, and how many ranks have none."""
    depth, buffers = network.depth, network.open_layers + network.close_layers
    if way.layout == "cyclic":
        if way.options.coarse != "sum" or way.options.levels > 2 or way.options.relaxation != "F":
            raise ValueError(f"layout='cyclic' is for coarse='sum', 2 levels and F-relaxation, not {way.options}")
        counts = [*Counter(Layout.deal(way.layout, depth, way.ranks, way.options).owners).values()]
    else:
        counts = [*ownership(depth, way.ranks, way.options.cfactor).layers]
    idle = way.ranks - len(counts)
    counts[0] += network.open_layers
    counts[-1] += network.close_layers
    step = layer_parallel(
        depth, way.ranks, way.options, costs, buffers=buffers, layout=way.layout, chain_slices=way.slices
    )
    return step, max(counts), idle


def all_ways(network: Network, ranks: int) -> Iterator[Way]:
    """What is worth a look: every division of the ranks into replicas, with each a pipeline or MGRIT."""
    for replicas in (d for d in range(1, ranks + 1) if ranks % d == 0 and d <= network.batch):
        each, samples = ranks // replicas, network.batch // replicas
        slices = [m for m in _SLICES if m <= samples]
        if each == 1:
            yield Way(replicas)
            continue
        if each <= network.layers:
            yield from (Way(replicas, each, slices=m) for m in slices)
        for (coarse, layout, consistent), iterations, cfactor in itertools.product(
            _SOLVERS, ((1, 1), (2, 1), (2, 2)), (2, 4, 8, 16)
        ):
            options = MGRIT(2, cfactor, *iterations, coarse=coarse)
            if layout == "cyclic":
                if each % cfactor == 0 or cfactor % each == 0:
                    yield Way(replicas, each, options, layout=layout)
            elif -(-network.depth // cfactor) >= each:
                yield from (Way(replicas, each, options, m, consistency=consistent) for m in slices)
