"""The NCCL transport, driven over a substitute library that moves the bytes between processes on the CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import launch
from mlpint import _core
from mlpint.comm import nccl

HERE = Path(__file__).parent
SOURCE = HERE / "fake_nccl" / "fake_nccl.cpp"


def _compile(directory, *flags, name="libnccl.so.2"):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    library = directory / name
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{name}", *flags]
    subprocess.run([compiler, *flags, "-o", library, SOURCE], check=True)
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return _compile(tmp_path_factory.mktemp("nccl"))


@pytest.mark.parametrize(
    ("ranks", "launcher", "checks"),
    [
        (2, "torchrun", ("traffic", "order", "devices", "failures", "found", "missing", "outbox", "stack")),
        (3, "mpich", ("traffic", "order", "devices", "found", "stack")),
        (4, "mpich", ("traffic",)),
    ],
)
def test_ranks(ranks, launcher, checks, library):
    environment = {"MLPINT_NCCL": str(library), "MLPINT_STALL_LIMIT": "30", "CUDA_VISIBLE_DEVICES": ""}
    result = launch.run(HERE / "nccl_worker.py", ranks, launcher, checks, environment).check()
    for check in checks:
        assert result.stdout.count(f"{check} passed") == ranks


def test_one_process(library, monkeypatch):
    monkeypatch.setenv("MLPINT_NCCL", str(library))
    transport = nccl.nccl_transport(_core.SelfTransport(), "cpu", host_memory=True)
    assert (transport.rank, transport.size, transport.sum(2.5)) == (0, 1, 2.5)
    transport.check()
    transport.synchronize()


def test_argument_before_environment(library, monkeypatch):
    monkeypatch.setenv("MLPINT_NCCL", "elsewhere.so")
    nccl.nccl_transport(_core.SelfTransport(), "cpu", library, host_memory=True)
    with pytest.raises(RuntimeError, match=r"set MLPINT_NCCL(.|\n)*elsewhere\.so: cannot open"):
        nccl.nccl_transport(_core.SelfTransport(), "cpu", host_memory=True)


def test_loaded_library_is_found_by_name(tmp_path):
    """As with torch, which loads it from a place that the system does not know; by a name that no real one has."""
    name = "libnccl-substitute.so.2"
    names = [name, str(_compile(tmp_path, name=name))]
    program = (
        "import ctypes, sys; from mlpint import _core; found = sys.argv[1:]\n"
        "try: _core.NcclLibrary(found[:1])\n"
        "except RuntimeError: ctypes.CDLL(found[1])\n"
        "print(_core.NcclLibrary(found[:1]).path, _core.NcclLibrary(found[:1]).version)"
    )
    run = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [name, "22703"]


def test_library_without_a_symbol(tmp_path):
    library = _compile(tmp_path, "-DFAKE_NCCL_WITHOUT_RECV")
    with pytest.raises(RuntimeError, match=f"{library} has no ncclRecv; NCCL 2.7 or later"):
        _core.NcclLibrary([str(library)])


def test_no_library(monkeypatch):
    monkeypatch.delenv("MLPINT_NCCL", raising=False)
    monkeypatch.setattr(nccl, "_NAME", "libnccl-absent.so.2")
    with pytest.raises(RuntimeError, match=r"cannot load NCCL; install a CUDA build(.|\n)*libnccl-absent"):
        nccl.nccl_transport(_core.SelfTransport(), "cpu", host_memory=True)


def test_a_start_that_hangs_ends_the_process(library):
    program = """
        from mlpint import _core
        from mlpint.comm import nccl
        alone = _core.SelfTransport()
        alone.stall_limit = 1
        nccl.nccl_transport(alone, "cpu", host_memory=True)
        """
    result = launch.run(program, 1, "alone", env={"MLPINT_NCCL": str(library), "FAKE_NCCL_START": "40"})
    assert result.returncode == 1 and result.seconds < 40, result.describe()
    assert "rank 0: NCCL has not connected the 1 ranks within 1 s" in result.stderr, result.stderr


def test_device_must_be_a_gpu_of_this_machine(library, monkeypatch):
    with pytest.raises(ValueError, match="rank 0: NCCL moves memory of GPUs, not of device 'cpu'"):
        nccl.nccl_transport(_core.SelfTransport(), "cpu", library)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="rank 0 was given GPU 2 and sees 2 GPUs"):
        nccl.nccl_transport(_core.SelfTransport(), 2, library)


def test_own_gpu_each(monkeypatch):
    class Properties:
        uuid = "GPU-1"

    class Ranks:
        size, device = 2, torch.device("cuda", 0)

        def __init__(self, other):
            self.other = other

        def gather(self, message):
            return [message, self.other]

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert nccl.own_gpu_each(Ranks(b"GPU-2"))
    assert not nccl.own_gpu_each(Ranks(b"GPU-1"))  # shared by both
    assert not nccl.own_gpu_each(Ranks(b""))  # the other rank has none


def test_synchronize_gives_up_after_the_stall_limit(library, monkeypatch):
    lib = _core.NcclLibrary([str(library)])
    transport = nccl.NcclTransport(lib, _core.SelfTransport(), lib.unique_id(), 0, lambda: 0)
    transport.stall_limit = 0.05
    queries = []

    class Event:  # of a stream that a receive holds up
        def record(self, stream):
            assert stream == "stream of 0"

        def query(self):
            queries.append(0)
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    with pytest.raises(_core.TransferError, match="rank 0: GPU 0 has waited 0 s for another rank"):
        transport.synchronize()
    assert len(queries) > 1
    with pytest.raises(RuntimeError, match="has been closed"):
        transport.check()


def test_unique_ids_differ_and_have_the_right_size(library):
    lib = _core.NcclLibrary([str(library)])
    a, b = lib.unique_id(), lib.unique_id()
    assert len(a) == len(b) == 128 and a != b
    with pytest.raises(ValueError, match="has 128 bytes, got 3"):
        _core.NcclTransport(lib, _core.SelfTransport(), b"abc", 0, lambda: 0)


def test_gpu_benchmark_without_gpus():
    script = HERE.parents[1] / "benchmarks" / "gpu_nccl.py"
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert run.returncode == 0 and "needs at least 2 GPUs" in run.stdout, run.stdout + run.stderr


@pytest.mark.gpu
def test_torchs_own_library_with_one_rank():
    """What one GPU can show of the real thing."""
    transport = nccl.nccl_transport(_core.SelfTransport(), "cuda:0")
    assert (transport.rank, transport.size, transport.device) == (0, 1, 0)
    assert _core.NcclLibrary(nccl._candidates(None)).version >= 20700
    transport.check()
    transport.synchronize()
    transport.close()
