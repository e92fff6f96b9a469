"""Runs named scenarios on all ranks of a job and reports each as a line of JSON from rank 0."""

import contextlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import mlpint


def run(scenarios, data=None):
    """Every scenario gets the Comm; one that raises on some rank is reported with the text of the lowest such rank.

    A scenario must fail on all ranks or end the job: after a failure on one rank alone the ranks are out of step, and
    the stall limit ends the job.

    data: replicas, of a mesh.
    """
    torch.set_num_threads(1)
    comm = mlpint.init(data=data)
    wanted = sys.argv[1:]
    for scenario in scenarios:
        name = scenario.__name__
        if wanted and name not in wanted:
            continue
        torch.manual_seed(0)
        error, started = "", time.perf_counter()
        try:
            scenario(comm)
        except Exception:
            error = traceback.format_exc()
            print(f"[rank {comm.rank}] {name}: {error}", file=sys.stderr, flush=True)
        if comm.world.rank == 0:
            print(
                json.dumps({"scenario": name, "seconds": round(time.perf_counter() - started, 1), "error": error}),
                flush=True,
            )
        failed = torch.tensor([float(bool(error))])
        comm.world.sum_ordered([failed])
        if failed.item():
            raise SystemExit(1)


@contextlib.contextmanager
def shared_folder(comm):
    """A temporary folder of rank 0's that all ranks use."""
    comm = comm.world
    name = comm.gather((tempfile.mkdtemp() if comm.rank == 0 else "").encode())[0].decode()
    try:
        yield Path(name)
        comm.barrier()
    finally:
        if comm.rank == 0:
            shutil.rmtree(name)


def raises(kind, word, action):
    """As pytest.raises, which the ranks of a program do without."""
    try:
        action()
    except kind as error:
        assert word in str(error), error
    else:
        raise AssertionError(f"no error with {word!r}")
