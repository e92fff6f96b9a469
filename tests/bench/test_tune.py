"""Tuning without a GPU: torch alone on the CPU, and the choice between made-up candidates."""

import json

import pytest
import torch

from mlpint.bench import timing, tune
from mlpint.bench.cases import layer_of
from mlpint.bench.shapes import Shape
from mlpint.bench.suite import CASES
from mlpint.cli import main
from mlpint.kernels import dispatch, tuned_files

CPU = torch.device("cpu")
FLAGS = [
    "tune",
    "--device",
    "cpu",
    "--kernels",
    "gated_linear",
    "--seconds",
    "0.001",
    "--d",
    "64",
    "--m",
    "32",
    "--j",
    "1,4",
]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Tests of kernels in the same process may have Triton interpret, and tuning would then time that."""
    monkeypatch.setattr(tune.providers, "_interpreting", lambda: False)


def test_no_gpu_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune"]) == 2
    assert "needs an NVIDIA GPU, and torch sees none" in capsys.readouterr().err


def test_cpu_writes_torch_entries(tmp_path, capsys):
    path = tmp_path / "new" / "cpu.json"
    assert main([*FLAGS, "--out", str(path)]) == 0
    data = json.loads(path.read_text())
    assert {"torch", "triton", "mlpint"} == set(data["versions"]) and data["date"] and "commit" in data
    entries = tuned_files.load(path).entries["gated_linear", "float32"]
    assert [(e.d, e.m, e.j, e.path, e.config) for e in entries] == [
        (64, 32, 1, "torch", None),
        (64, 32, 4, "torch", None),
    ]
    assert all(e.microseconds["torch"] > 0 for e in entries)
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]  # nothing half written


def test_other_shapes_in_the_file_are_kept(tmp_path):
    path = tmp_path / "cpu.json"
    main([*FLAGS, "--out", str(path)])
    assert main([*FLAGS[:-2], "--j", "4,16", "--out", str(path)]) == 0
    entries = tuned_files.load(path).entries["gated_linear", "float32"]
    assert sorted(e.j for e in entries) == [1, 4, 16]


def test_files_that_are_not_written_over(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    tuned_files.write(path, "NVIDIA H200", (9, 0), {}, [])
    before = path.read_text()
    assert main([*FLAGS, "--out", str(path)]) == 2
    assert "holds what was tuned on NVIDIA H200" in capsys.readouterr().err and path.read_text() == before
    path.write_text("{")
    assert main([*FLAGS, "--out", str(path)]) == 2 and path.read_text() == "{"
    assert main([*FLAGS, "--out", "/proc/none/cpu.json"]) == 2


@pytest.fixture
def candidates(monkeypatch):
    """Three made-up configurations of a made-up kernel: wrong, slow and fast; returns how long each takes."""
    case = CASES["gated_linear"]
    seconds = {"torch": 4.0, 0: 0.5, 1: 3.0, 2: 2.0}

    def kernel(inputs, mode):
        def call():
            number = dispatch.config(case.op, 64, 32, 1, torch.float32, CPU)["BLOCK"]
            if number == 3:
                raise RuntimeError("out of resources: shared memory")
            right = torch.stack([case.plain(layer_of(inputs, n))[0] for n in range(len(inputs["x"]))])
            return (right if number else 2 * right,)

        return call

    def host_wall(call, device, effort):
        choice = seen(call)
        return [seconds[choice]]

    def seen(call):
        asked = []
        real = dispatch.config
        monkeypatch.setattr(dispatch, "config", lambda *a: asked.append(real(*a)) or real(*a))
        call()
        monkeypatch.setattr(dispatch, "config", real)
        return asked[0]["BLOCK"] if asked else "torch"

    monkeypatch.setattr(case, "kernel", kernel, raising=False)
    monkeypatch.setattr(case, "configs", lambda shape, mode: [{"BLOCK": n} for n in range(4)], raising=False)
    monkeypatch.setattr(tune.providers, "left_out", lambda provider, device: None)
    monkeypatch.setattr(timing, "host_wall", host_wall)
    return seconds


def best():
    tuner = tune.Tuner(CPU, timing.Effort(0.0, 2, 2))
    return tuner.best(CASES["gated_linear"], Shape(64, 1, 32), "forward")


def test_the_fastest_right_candidate_is_taken(candidates):
    entry, notes = best()
    assert (entry.path, entry.config) == ("triton", {"BLOCK": 2})
    assert entry.microseconds == {"torch": 4e6, "triton": 2e6}
    assert "Inaccurate" in notes[0] and "out of resources" in notes[1] and "with {'BLOCK': 2}" in notes[2]


def test_torch_competes(candidates):
    candidates["torch"] = 2.01
    entry, _ = best()
    assert (entry.path, entry.config) == ("torch", None) and entry.microseconds["triton"] == 2e6
