"""``mlpint plan``: what a training step costs by the cost model, on so many ranks."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..errors import ConfigError
from ..planning.cost_model import plan
from ..training.config import KEYS, SolverConfig, TrainConfig
from .flags import add_flag, flag_values

_NOT_PLANNED = (
    "tolerance",
    "step_size",
    "serial_microbatches",
    "chain_slices",
    "consistency",
    "consistency_start",
    "consistency_warmup",
    "recompute",
    "control",
    "control_target",
    "control_every",
)
_PLAN_KEYS = tuple(f.name for f in dataclasses.fields(SolverConfig) if f.name not in _NOT_PLANNED)


def add_flags(parser: Any) -> None:
    """The flags of ``mlpint plan``: the ranks, and those keys of the configuration that the cost model knows."""
    parser.add_argument("--ranks", default=2, type=int, metavar="N", help="ranks (default 2)")
    parser.add_argument(
        "--microbatches",
        default=4,
        type=int,
        metavar="N",
        help="slices of the batch that a pipeline streams (default 4)",
    )
    for name in ("layers", *_PLAN_KEYS):
        add_flag(parser, KEYS[name])


def run(options: argparse.Namespace) -> None:
    """Prints the cost of each way to spread the layers over the ranks.

    Raises:
        ConfigError: flags out of range, or a layout that the ranks do not allow.
    """
    config = TrainConfig.of(flag_values(options))
    for name in ("ranks", "microbatches"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} = {getattr(options, name)}: must be an integer of at least 1")
    solver, layers = config.solver, config.model.layers
    mgrit = solver.mgrit()
    try:
        costs = plan(
            layers,
            options.ranks,
            mgrit,
            buffers=solver.open_layers + solver.close_layers,
            microbatches=options.microbatches,
            layout=solver.layout,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    mode = f"MGRIT ({mgrit.forward_iters},{mgrit.backward_iters}), cfactor {mgrit.cfactor}, {mgrit.levels} levels"
    mode += f", {mgrit.coarse}" + (", cyclic layout" if solver.layout == "cyclic" else "")
    rows = {
        "serial": (costs.serial, "exact gradients"),
        "pipeline": (costs.pipeline, f"exact gradients, {options.microbatches} microbatches"),
        "layer-parallel": (costs.layer_parallel, mode),
    }
    print(f"{layers} layers on {options.ranks} ranks; a step in units of one layer's forward (model, not measured)")
    for name, (cost, note) in rows.items():
        print(f"  {name:<15}{cost:>8.1f}  speed-up {costs.serial / cost:>5.2f}  {note}")
    print(f"fastest: {costs.fastest.replace('_', '-')}")
