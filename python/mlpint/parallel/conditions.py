"""What a pass through a stack depends on, beside the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from ..comm.communicator import Comm
from ..layers.consistency import check_weight
from ..layers.random_keys import LayerRandom
from ..layers.store import LayerStore
from ..mgrit.layout import Layout
from ..mgrit.learnt_operators import LearntOperators
from ..mgrit.options import MGRIT
from ..mgrit.solvers import Solvers
from ..mgrit.stats import Stats
from .shared_parameters import SharedParameters


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """How a stack runs. See :meth:`mlpint.LayerParallel.using`.

    Attributes:
        layout: the layers that run, and who owns them.
        store: those of them that are on this rank; goes with the layout.
        layer_random: their random numbers; goes with the layout.
        options: how the depth is solved.
        recompute: whether layers are evaluated again for their gradients.
        serial_microbatches: slices of the batch in exact sweeps.
        chain_slices: slices of the batch in the coarse sweeps that go from rank to rank; "auto": measured.
        consistency: mu of the consistency term; 0: there is none.
        watch_residuals: whether residual norms are computed, even if no tolerance needs them.
        learning: whether coarse operators learn from the passes.
        keys: the dropout keys of passes that repeat earlier ones and are not counted; None: new passes.
    """

    layout: Layout
    store: LayerStore
    layer_random: LayerRandom
    options: MGRIT
    recompute: bool = False
    serial_microbatches: int = 1
    chain_slices: int | Literal["auto"] = 1
    consistency: float = 0.0
    watch_residuals: bool = False
    learning: bool = True
    keys: Iterator[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.options, MGRIT):
            raise TypeError(f"options must be an mlpint.MGRIT, got {type(self.options).__name__}")
        check_weight(self.consistency)
        for name in ("serial_microbatches", "chain_slices"):
            value = getattr(self, name)
            if name == "chain_slices" and value == "auto":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                or_auto = ' or "auto"' if name == "chain_slices" else ""
                raise ValueError(f"{name} = {value!r}: must be an integer of at least 1{or_auto}")


@dataclasses.dataclass(frozen=True, eq=False)
class PassSetup:
    """What a stack hands to one of its passes.

    Attributes:
        conditions: under which it runs, backwards too.
        comm: the ranks.
        solvers, operators: those of the stack.
        shared: parameters that layers of several ranks share.
        number: of the pass.
        key: (step, microbatch) of the dropout keys.
        training: whether the stack is in training mode.
        done: checks that the stack has made and warnings that it has given, of those that are due once.
        slices_found: what ``chain_slices="auto"`` has come to, by the number of samples.
        tied_outside: names the layers' parameters that are used outside the stack too.
        gradients_ready: what takes this rank's gradients as soon as they are known, asked for in the backward.
        stats: to be filled by the pass.
    """

    conditions: Conditions
    comm: Comm
    solvers: Solvers
    operators: LearntOperators
    shared: SharedParameters
    number: int
    key: tuple[int, int]
    training: bool
    done: set[str]
    slices_found: dict[int, int]
    tied_outside: Callable[[], list[str]]
    gradients_ready: Callable[[], Callable[[dict[Any, torch.Tensor]], None] | None]
    stats: Stats
