"""``mlpint train``: the configuration from flags, file and checkpoint, and the ranks that train by it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..comm import Comm, init
from ..comm.collectively import collectively
from ..errors import ConfigError, LaunchError, OtherRankError
from ..training.command import train
from ..training.config import SECTIONS, TrainConfig, from_saved, read_toml
from ..training.tasks import Task, make
from .flags import add_flag, flag_values


def add_flags(parser: Any) -> None:
    """The flags of ``mlpint train``: every key of the configuration, and the file with them."""
    tables = ", ".join(f"[{section}]" for section in SECTIONS)
    parser.add_argument("--config", metavar="FILE", help=f"TOML file with tables {tables}")
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(name)
        for field in dataclasses.fields(section):
            add_flag(group, field)


def run(options: argparse.Namespace) -> None:
    """Trains. Collective.

    Raises:
        UserError: flags, files or ranks that do not fit, and what training raises.
    """
    flags = flag_values(options)  # known to be right before the ranks are connected
    comm = _connected()
    # Files may be missing or different on one machine only: from here on an error on one rank is an error on all.
    prepared: list[Any] = []
    collectively(comm, lambda: prepared.extend(prepare(flags, options.config)))
    config, task, checkpoint = prepared
    try:
        comm = init(data=config.run.data_parallel)
    except ValueError as error:
        resumed = "" if checkpoint is None else "; the run was begun with it, and --data-parallel can give another"
        raise ConfigError(f"data_parallel: {error}{resumed}") from None
    if config.run.threads or comm.size > 1:
        torch.set_num_threads(config.run.threads or 1)
    train(config, task, comm, checkpoint)


def _connected() -> Comm:
    try:
        return init()
    except OtherRankError:
        raise
    except (RuntimeError, ValueError) as error:
        raise LaunchError(str(error)) from None


def prepare(flags: Mapping[str, Any], config_file: str | None) -> tuple[TrainConfig, Task, Checkpoint | None]:
    """The whole configuration, the task and the checkpoint to go on from; all that reads files before training."""
    values = {**(read_toml(config_file) if config_file else {}), **flags}
    if values.get("resume") and values.get("init_from"):
        raise ConfigError(
            f"init_from = {values['init_from']!r}: is for a new run, and resume = {values['resume']!r} goes on with "
            "one; give one of them"
        )
    checkpoint = open_checkpoint(values["resume"]) if values.get("resume") else None
    if checkpoint is not None:
        saved = from_saved(checkpoint.info["config"])
        values = {**{k: v for k, v in saved.items() if k not in ("out", "resume")}, **values}
    config = TrainConfig.of(values)
    if checkpoint is not None:
        _check_resumable(config, saved, checkpoint)
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch sees no GPU; must be auto or cpu here")
    return config, make(config), checkpoint


def _check_resumable(config: TrainConfig, saved: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    now, then = config.flat(), TrainConfig.of(saved).flat()  # keys that came later have their defaults
    for name in (*(f.name for f in dataclasses.fields(config.model)), "sequence", "optimizer", "multilevel", "preset"):
        if now[name] != then[name]:
            raise ConfigError(f"{name} = {now[name]!r}: must be {then[name]!r}, as in {checkpoint.path}")
    done = checkpoint.info.get("fine_steps", checkpoint.step)
    if config.run.steps <= done:
        raise ConfigError(f"steps = {config.run.steps}: must be above {done}, where {checkpoint.path} stands")
