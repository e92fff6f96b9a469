"""How this process was started: by an mpirun, by torchrun, by SLURM, or alone. Read from the environment only."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    kind: str  # "alone", "mpi" or "torch"
    launcher: str = "none"  # for messages
    rank: int = 0
    size: int = 1
    local_rank: int | None = None  # None: the launcher does not say
    address: str = "127.0.0.1"  # where a torch group meets
    port: int = 29500


def detect(environment: Mapping[str, str] = os.environ) -> Launch:
    """The innermost launcher decides: a torchrun started by mpirun is torchrun's.

    Raises:
        ValueError: a launcher's variable is not a number.
    """
    env = _Numbers(environment)
    if "TORCHELASTIC_RUN_ID" in environment:
        return _torch(environment, "torchrun")
    if "OMPI_COMM_WORLD_SIZE" in environment:
        names = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
        return _mpi("Open MPI's mpirun", env, *names)
    if "PMI_SIZE" in environment:  # MPICH, Intel MPI, Cray MPICH, MVAPICH; also srun --mpi=pmi2
        return _mpi("an MPICH-like mpirun", env, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
    if all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return _torch(environment, "RANK and WORLD_SIZE in the environment")
    # srun sets the size of its step; a batch script itself runs in a step without one.
    if env("SLURM_STEP_NUM_TASKS", 1) > 1:
        if "PMIX_RANK" in environment or "PMI_RANK" in environment:
            return _mpi("srun", env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        return _slurm_torch(environment, env)
    return Launch("alone")


class _Numbers:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment

    def __call__(self, name: str, default: int | None = None) -> int:
        text = self.environment.get(name)
        if text is None:
            if default is None:
                raise ValueError(f"the launcher did not set {name}; start every rank with the same launcher")
            return default
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{name}={text!r} in the environment is not a number") from None

    def optional(self, name: str) -> int | None:
        return self(name) if name in self.environment else None


def _mpi(launcher: str, env: _Numbers, rank: str, size: str, local_rank: str) -> Launch:
    if env(size) == 1:
        return Launch("alone", launcher)
    return Launch("mpi", launcher, env(rank), env(size), env.optional(local_rank))


def _torch(environment: Mapping[str, str], launcher: str) -> Launch:
    env = _Numbers(environment)
    if env("WORLD_SIZE") == 1:
        return Launch("alone", launcher)
    return Launch(
        "torch",
        launcher,
        env("RANK"),
        env("WORLD_SIZE"),
        env.optional("LOCAL_RANK"),
        environment.get("MASTER_ADDR", "127.0.0.1"),
        env("MASTER_PORT", 29500),
    )


def _slurm_torch(environment: Mapping[str, str], env: _Numbers) -> Launch:
    address = environment.get("MASTER_ADDR") or first_host(
        environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    )
    if not address:
        raise ValueError(
            "srun started this process without an MPI and without a node list; use srun --mpi=pmix (or --mpi=pmi2), "
            "or set MASTER_ADDR to the first node"
        )
    return Launch(
        "torch",
        "srun without --mpi",
        env("SLURM_PROCID"),
        env("SLURM_STEP_NUM_TASKS"),
        env.optional("SLURM_LOCALID"),
        address,
        # Alike on all ranks, different for jobs that share a node.
        env("MASTER_PORT", 20000 + (env("SLURM_JOB_ID", 0) * 31 + env("SLURM_STEP_ID", 0)) % 20000),
    )


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: ``node[003-007,9],other`` gives ``node003``."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


def this_machine() -> bytes:
    """What only processes of one machine have in common: its name and the number it drew when it was booted."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return platform.node().encode() + (boot.read_bytes() if boot.exists() else b"")


def positive_seconds(name: str, value: object) -> float:
    """A time limit as a number.

    Raises:
        ValueError: it is not a positive number; names the setting.
    """
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
    return seconds
