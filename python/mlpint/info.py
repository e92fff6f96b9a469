"""``mlpint info``: what mlpint finds on this machine."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .comm import launchers
from .training.metrics import machine


def add_flags(parser: Any) -> None:
    """``mlpint info`` has no flags."""


def run(options: argparse.Namespace) -> None:
    """Prints what was found, a line each; of several ranks the first does."""
    if launchers.detect().rank:
        return
    for name, value in info():
        print(f"{name:<18}{value}")


def info() -> Iterator[tuple[str, str]]:
    """Pairs of a name and what was found. Starts no MPI and touches no GPU memory."""
    about = machine()
    yield "mlpint", about["mlpint"]
    yield "python", f"{about['python']} on {about['system']}"
    yield "processor", f"{about['processor']}, {about['cores']} cores"
    for package in ("torch", "numpy", "mpi4py", "safetensors"):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "MPI library", _mpi_library()
    yield "mpirun", shutil.which("mpirun") or "not on PATH"
    yield "torchrun", shutil.which("torchrun") or "not on PATH"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "GPUs", ", ".join(gpus) or "none"
    yield "torch.distributed", ", ".join(_distributed_backends()) or "not available"
    launch = launchers.detect()
    yield "started by", f"{launch.launcher}, {launch.size} rank{'s' if launch.size > 1 else ''}"


def _mpi_library() -> str:
    try:
        import mpi4py

        options = mpi4py.rc.initialize
        mpi4py.rc.initialize = False
        try:
            from mpi4py import MPI
        finally:
            mpi4py.rc.initialize = options
        return MPI.Get_library_version().splitlines()[0].strip("\0 ")
    except (ImportError, RuntimeError) as error:
        return f'none ({str(error).splitlines()[0]}); pip install "mlpint[mpich]" brings one'


def _distributed_backends() -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    return [name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there]
