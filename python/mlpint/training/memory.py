"""Refuses a run that cannot fit into memory before any of it is taken."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

from ..errors import ConfigError
from .config import TrainConfig

_FLOAT = 4  # bytes


def check_memory(config: TrainConfig) -> None:
    """Compares the least that a rank must hold with all the memory that there is.

    Every rank draws the whole model before it keeps its own layers. Of activations only the batch, or one hidden state
    of it, is counted: what passes here may still be too large.

    Raises:
        ConfigError: naming the keys that make it so large.
    """
    there = memory()
    for what, values in _needs(config).items():
        if _FLOAT * values > there:
            raise ConfigError(
                f"{what}: take at least {_FLOAT * values / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f} GiB; "
                "must be smaller"
            )


def memory() -> float:
    """Bytes that this process may hold: the machine's memory, or a limit set to it."""
    limits = [float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")]
    limits += [soft for soft in (resource.getrlimit(resource.RLIMIT_AS)[0],) if soft != resource.RLIM_INFINITY]
    try:
        limits.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        pass  # no control group of its own, or one without a limit ("max")
    return min(limits)


def _needs(config: TrainConfig) -> dict[str, int]:
    """Numbers to be held, by the settings that they come from."""
    model, data = config.model, config.data
    layer = 4 * model.dim**2 + 2 * model.dim * (model.ffn or 4 * model.dim)
    needs = {
        f"layers = {model.layers}, dim = {model.dim}, ffn = {model.ffn}": model.layers * layer,
        f"vocabulary = {model.vocabulary}, dim = {model.dim}": model.vocabulary * model.dim,
    }
    if model.task == "vit":
        side = data.image_size + 2 * data.augment
        needs[f"image_size = {data.image_size}, augment = {data.augment}, batch = {data.batch}"] = data.batch * side**2
    else:
        needs[f"sequence = {data.sequence}, dim = {model.dim}"] = data.sequence * model.dim
    if model.task in ("gpt", "bert"):
        state = math.prod((data.batch, data.sequence, model.dim))
        needs[f"batch = {data.batch}, sequence = {data.sequence}, dim = {model.dim}"] = state
    return needs
