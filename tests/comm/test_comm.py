"""Comm does on real ranks what it says (programs/communication.py); init finds every launcher, or names the remedy."""

import re

import pytest
import torch

from launch import run
from mlpint import Comm, init
from mlpint.comm import process_group
from mlpint.comm.launchers import Launch, detect, first_host
from mlpint.errors import LaunchError
from scenarios import check, names

JOBS = [("alone", 1), *(("mpich", n) for n in (1, 2, 3, 4)), ("openmpi", 3), ("torchrun", 1), ("torchrun", 3)]


@pytest.mark.parametrize("scenario", names("communication.py"))
@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_communication(scenario, launcher, ranks):
    check("communication.py", scenario, launcher, ranks)


HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "4321"}
TORCHRUN = TORCH | {"TORCHELASTIC_RUN_ID": "x"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[07-09]"}
PORT = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch("alone")),
        (HYDRA, Launch("mpi", "an MPICH-like mpirun", 2, 4, 1)),
        (HYDRA | {"PMI_RANK": "0", "PMI_SIZE": "1"}, Launch("alone", "an MPICH-like mpirun")),
        (OPEN_MPI, Launch("mpi", "Open MPI's mpirun", 1, 2, 0)),
        (OPEN_MPI | TORCH, Launch("mpi", "Open MPI's mpirun", 1, 2, 0)),
        (TORCHRUN, Launch("torch", "torchrun", 3, 4, 1, "node7", 4321)),
        (TORCHRUN | OPEN_MPI, Launch("torch", "torchrun", 3, 4, 1, "node7", 4321)),
        (TORCHRUN | {"WORLD_SIZE": "1"}, Launch("alone", "torchrun")),
        (TORCH, Launch("torch", "RANK and WORLD_SIZE in the environment", 3, 4, 1, "node7", 4321)),
        ({"RANK": "0", "WORLD_SIZE": "8"}, Launch("alone")),  # nowhere to meet
        (SRUN | PORT, Launch("torch", "srun without --mpi", 3, 4, 1, "n07", 20373)),
        (SRUN | {"MASTER_ADDR": "n01", "MASTER_PORT": "99"}, Launch("torch", "srun without --mpi", 3, 4, 1, "n01", 99)),
        (SRUN | {"PMIX_RANK": "3"}, Launch("mpi", "srun", 3, 4, 1)),
        (SRUN | HYDRA, Launch("mpi", "an MPICH-like mpirun", 2, 4, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Launch("alone")),  # a batch script's own shell
    ],
)
def test_launcher_is_read_from_the_environment(environment, expected):
    assert detect(environment) == expected


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (HYDRA | {"PMI_RANK": "two"}, "PMI_RANK='two'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "did not set OMPI_COMM_WORLD_RANK"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, "srun --mpi=pmix"),
    ],
)
def test_launcher_that_says_half(environment, text):
    with pytest.raises(ValueError, match=text):
        detect(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu-3-[007,9-12].x,b2", "gpu-3-007.x"),
        ("node[003-007,9],other", "node003"),
        ("", ""),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("limit", [0, -1, float("inf"), float("nan"), "soon"])
def test_stall_limit_must_be_a_positive_number(limit, monkeypatch):
    with pytest.raises(ValueError, match=f"stall_limit must be a positive number of seconds, got {limit!r}"):
        init(stall_limit=limit)
    monkeypatch.setattr("mlpint.comm.start._current", None)  # of tests before this one in the same process
    monkeypatch.setenv("MLPINT_STALL_LIMIT", str(limit))
    with pytest.raises(ValueError, match=f"MLPINT_STALL_LIMIT must be a positive number of seconds, got '{limit}'"):
        Comm.of(None)


@pytest.mark.parametrize(
    ("backend", "text"), [("MPI", "got 'MPI'"), ("mpi", "needs mpirun"), ("gloo", "needs torchrun")]
)
def test_backend_that_the_launcher_has_not(backend, text):
    result = run(f"import mlpint; mlpint.init(backend={backend!r})", 1, "alone")
    assert result.returncode != 0 and text in result.stderr.splitlines()[-1], result.stderr


@pytest.mark.parametrize("launcher", ["mpich", "openmpi", "torchrun"])
def test_init_prints_nothing(launcher):
    result = run("import mlpint; mlpint.init().barrier()", 2, launcher).check()
    assert result.stdout.strip() == result.stderr.strip() == ""


def test_import_loads_no_mpi_and_alone_neither():
    run("import sys, mlpint; mlpint.init(); assert not any('mpi4py' in m for m in sys.modules)", 1, "alone").check()


def test_backend_self_is_alone_under_any_launcher():
    program = "import mlpint; comm = mlpint.init(backend='self'); assert (comm.rank, comm.size) == (0, 1)"
    run(program, 2, "mpich").check()


@pytest.mark.parametrize(
    ("launcher", "loaded", "symptom"),
    [
        ("mpich+openmpi", "mpi4py uses Open MPI", "it sees 1 rank"),
        ("openmpi+mpich", "mpi4py uses MPICH", "which is another MPI"),
    ],
)
def test_mpirun_of_another_mpi(launcher, loaded, symptom):
    result = run("import mlpint; mlpint.init(); print('on')", 2, launcher)
    assert result.returncode != 0 and "on\n" not in result.stdout and not result.orphans, result.describe()
    for text in ("rank 1 of 2", loaded, symptom, 'pip install "mlpint[mpich]"', "MPI4PY_LIBMPI", "torchrun"):
        assert text in result.stderr, (text, result.stderr)


def test_missing_mpi():
    result = run("import mlpint; mlpint.init()", 2, "mpich", env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert result.returncode != 0
    assert "there is no MPI library" in result.stderr and 'pip install "mlpint[mpich]"' in result.stderr, result.stderr


def test_warn_after_must_be_a_positive_number(monkeypatch):
    monkeypatch.setenv("MLPINT_WARN_AFTER", "soon")
    with pytest.raises(ValueError, match="MLPINT_WARN_AFTER must be a positive number of seconds, got 'soon'"):
        init()


@pytest.mark.parametrize("launcher", ["mpich", "torchrun"])
def test_long_waits_are_reported_once_each(launcher):
    program = """
        import time, torch, mlpint
        comm = mlpint.init()
        torch.manual_seed(0)
        stack = mlpint.LayerParallel([torch.nn.Linear(4, 4) for _ in range(4)], comm=comm)
        comm.barrier()
        for late, call in (1, comm.barrier), (1, comm.barrier), (0, lambda: stack(torch.ones(2, 4))):
            if comm.rank == late:
                time.sleep(4)
            call()
        """
    result = run(program, 2, launcher, env={"MLPINT_WARN_AFTER": "1.5"}).check()
    warnings = re.findall(
        r"^\[mlpint\] rank (\d) has waited \d+ s for rank (\d) in (\w+)\.", result.stderr, re.MULTILINE
    )
    assert warnings.count(("0", "1", "barrier")) == 2 and warnings.count(("1", "0", "forward")) == 1, result.stderr


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("", "rank 1 of 2 could not connect to the others at 127.0.0.1:1"),  # where nobody listens
        # As where hosts have 127.0.0.1 by their names: one rank fails, and gloo has the other try again and again.
        (
            "import torch.distributed as dist, time\n"
            "dist.rendezvous = lambda *_, **__: iter([(None, 1, 2)])\n"
            "dist.init_process_group = lambda *_, **__: time.sleep(50)\n",
            "rank 1 of 2 could not connect to the others at 127.0.0.1:1 within 2 s",
        ),
    ],
)
def test_ranks_that_cannot_connect_end_in_time_and_say_what_to_set(program, text):
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    program += "import mlpint; mlpint.init(stall_limit=2)"
    result = run(program, 1, "alone", env=environment)
    assert result.returncode == 1 and result.seconds < 50, result.describe()
    for part in (text, "MASTER_ADDR", "GLOO_SOCKET_IFNAME"):
        assert part in result.stderr, result.stderr


def test_rank_that_is_refused_says_what_to_set(monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("refused")

    monkeypatch.setattr(torch.distributed, "rendezvous", refused)
    with pytest.raises(LaunchError, match=r"to the others at there:1: refused\. .* set GLOO_SOCKET_IFNAME"):
        process_group.start(Launch("torch", "torchrun", 1, 2, address="there", port=1), 30)


def test_group_without_host_memory_and_ranks_that_know_no_local_rank():
    """Of three ranks two share a machine; their group serves GPUs only, as one of NCCL would."""
    run(
        """
        import os, platform
        import torch.distributed as dist
        os.environ.pop("LOCAL_RANK")
        dist.init_process_group("cuda:gloo")
        import mlpint
        platform.node = lambda: ["one", "two", "one"][dist.get_rank()]
        comm = mlpint.init()
        assert comm.gather(b"%d" % comm.rank) == [b"0", b"1", b"2"]
        assert comm.local_rank == [0, 0, 1][comm.rank], comm.local_rank
        part = dist.new_group([1, 2], backend="cuda:gloo")
        if comm.rank:
            assert mlpint.Comm.of(part).gather(b"%d" % comm.rank) == [b"1", b"2"]
        """,
        3,
        "torchrun",
    ).check()


def test_script_that_has_connected_the_ranks_itself():
    run(
        """
        import torch.distributed as dist
        dist.init_process_group("gloo")
        import mlpint
        comm = mlpint.init()
        assert comm.size == 2 and len(comm.gather(b"")) == 2
        """,
        2,
        "torchrun",
    ).check()
    run(
        """
        from mpi4py import MPI
        import mlpint
        comm = mlpint.init()
        assert comm.size == 2 and len(comm.gather(b"")) == 2
        """,
        2,
        "mpich",
    ).check()
