"""What a figure was measured on, and statistics of timings taken in turn."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence

import torch

import mlpint


def describe() -> str:
    """One line: processor, cores, load, versions."""
    model = platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s) a rank"
    )


def start() -> mlpint.Comm:
    """One torch thread a rank; connects the ranks, of which the first prints the description."""
    torch.set_num_threads(1)
    comm = mlpint.init()
    if comm.rank == 0:
        print(describe(), flush=True)
    return comm


def mpi_library() -> str:
    """Name and version of the MPI that mpi4py has loaded."""
    from mpi4py import MPI

    return MPI.Get_library_version().split("\n", 1)[0].strip().rstrip("\x00")


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of timings taken side by side."""
    ratios = sorted(o / u for o, u in zip(over, under, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return median, low, high
