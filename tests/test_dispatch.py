"""Which path a shape takes: nearest tuned entry, limits, fallbacks; files that cannot be used; what explain says.

A GPU is made up where one is needed: dispatch asks torch for its name and compute capability only.
"""

import json
import subprocess
import sys

import pytest
import torch

from mlpint import kernels
from mlpint.kernels import dispatch, tuned_files
from mlpint.kernels.dispatch import Choice
from mlpint.kernels.tuned_files import Entry, TunedFileError
from mlpint.nn import Block

BF16 = torch.bfloat16
TILES = {"BLOCK_M": 64, "num_warps": 4}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A made-up H200 with no files; returns where the user's file is looked for."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(tuned_files, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MLPINT_TUNED", raising=False)
    dispatch.forget()
    yield tmp_path / "mlpint" / "nvidia-h200.json"
    dispatch.forget()


def entry(d=256, m=8192, j=1, dtype="bfloat16", path="triton", op="ln_linear", **config):
    return Entry(op, d, m, j, dtype, path, (config or TILES) if path == "triton" else None, {"torch": 9.0, path: 5.0})


def write(path, *entries, device="NVIDIA H200", capability=(9, 0)):
    tuned_files.write(path, device, capability, {"date": "today"}, entries)
    dispatch.forget()


def chosen(d=256, m=8192, j=1, dtype=BF16, device="cuda", op="ln_linear"):
    return dispatch.choose(op, d=d, m=m, j=j, dtype=dtype, device=device)


def test_cpu_takes_torch():
    choice = chosen(device="cpu")
    assert (choice.path, choice.config) == ("torch", None) and "CPU" in choice.why


def test_without_entries_torch(gpu):
    choice = chosen()
    assert (
        choice.path == "torch" and "no tuned entry for ln_linear bfloat16" in choice.why and "mlpint tune" in choice.why
    )


def test_without_triton_torch(gpu, monkeypatch):
    write(gpu, entry())
    monkeypatch.setattr(dispatch, "triton_is_installed", lambda: False)
    assert chosen() == Choice("torch", None, "Triton is not installed")


def test_estimated_files_come_last_and_say_so(gpu, tmp_path):
    shipped = tmp_path / "shipped"
    tuned_files.write(shipped / "a-guess.json", "any sm_90", (9, 0), {"estimated": True}, [entry(BLOCK_M=16)])
    dispatch.forget()
    assert chosen().config == {"BLOCK_M": 16} and "triton is estimated to be the faster at" in chosen().why
    tuned_files.write(shipped / "other.json", "NVIDIA H100", (9, 0), {}, [entry(BLOCK_M=32)])
    dispatch.forget()
    assert chosen().config == {"BLOCK_M": 32} and "estimated" not in chosen().why
    write(gpu, entry(path="torch"))
    assert chosen().path == "torch"


@pytest.mark.parametrize("capability", [80, 90])
def test_estimates_that_are_shipped(capability):
    file = tuned_files.load(tuned_files.SHIPPED / f"estimated-sm{capability}.json")
    assert file.estimated and file.capability == divmod(capability, 10)
    operations = {op for op, _ in file.entries}
    assert {"gated_linear", "gated_backward", "pack_heads"} <= operations <= set(dispatch.OPERATIONS)
    if capability == 80:
        assert {"ln_linear", "linear_axpy", "ln_backward_add"} <= operations
    for entry in (e for of_op in file.entries.values() for e in of_op):
        assert entry.path == "triton" and not entry.microseconds


def test_old_gpu_takes_torch(gpu, monkeypatch):
    write(gpu, entry())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "sm_75 is older" in chosen().why


def test_entry_itself(gpu):
    write(gpu, entry(BLOCK_M=32), entry(d=512, path="torch"), entry(dtype="float32", BLOCK_M=16))
    assert chosen().path == "triton" and chosen().config == {"BLOCK_M": 32}
    assert "triton 5.0 us" in chosen().why and "nvidia-h200.json" in chosen().why
    assert chosen(dtype=torch.float32).config == {"BLOCK_M": 16}
    assert chosen(d=512).path == "torch" and "torch is the faster" in chosen(d=512).why
    assert chosen(op="mlp").path == "torch"
    assert dispatch.config("ln_linear", 256, 8192, 1, BF16, torch.device("cuda")) == {"BLOCK_M": 32}
    assert dispatch.config("ln_linear", 512, 8192, 1, BF16, torch.device("cuda")) is None


def test_nearest_within_limits(gpu):
    write(gpu, entry(m=1024, BLOCK_M=16), entry(m=8192, BLOCK_M=64))
    assert chosen(m=2000).config == {"BLOCK_M": 16}
    assert chosen(m=5000).config == {"BLOCK_M": 64}
    assert chosen(m=4 * 8192).path == "triton" and chosen(m=4 * 8192 + 1).path == "torch"
    assert chosen(d=384).path == "triton" and chosen(d=385).path == "torch"
    # Rows are M x J: half of M with twice J are as many, and eight times J is another thing.
    assert chosen(m=4096, j=2).config == {"BLOCK_M": 64} and chosen(m=1024, j=8).path == "torch"


def test_an_entry_serves_no_width_that_its_kernel_cannot_hold(gpu):
    write(gpu, entry(op="mlp"))
    assert chosen(op="mlp").path == "triton" and chosen(op="mlp", d=320).path == "torch"
    assert "at most 256 channels, not 320" in chosen(op="mlp", d=320).why


def test_width_weighs_more_than_rows(gpu):
    write(gpu, entry(d=256, m=8192, BLOCK_M=1), entry(d=384, m=4096, BLOCK_M=2))
    assert chosen(d=384, m=8192).config == {"BLOCK_M": 2}


def test_users_file_before_shipped_ones(gpu):
    write(tuned_files.SHIPPED / "nvidia-h100.json", entry(BLOCK_M=1), device="NVIDIA H100")
    assert chosen().config == {"BLOCK_M": 1}  # of the same architecture
    write(tuned_files.SHIPPED / "nvidia-h200.json", entry(BLOCK_M=2))
    assert chosen().config == {"BLOCK_M": 2}
    write(tuned_files.SHIPPED / "nvidia-a100.json", entry(BLOCK_M=4), capability=(8, 0))
    assert chosen().config == {"BLOCK_M": 2}
    write(gpu, entry(BLOCK_M=3))
    assert chosen().config == {"BLOCK_M": 3}


def test_mlpint_tuned_names_the_file(gpu, monkeypatch, tmp_path):
    write(tmp_path / "mine.json", entry())
    monkeypatch.setenv("MLPINT_TUNED", str(tmp_path / "mine.json"))
    assert chosen().path == "triton"
    monkeypatch.setenv("MLPINT_TUNED", str(tmp_path / "none.json"))
    dispatch.forget()
    with pytest.raises(TunedFileError, match=r"none\.json: cannot be read.*unset MLPINT_TUNED"):
        chosen()


def test_file_of_another_architecture_is_refused(gpu):
    write(gpu, entry(), device="NVIDIA A100", capability=(8, 0))
    with pytest.raises(TunedFileError, match=r"nvidia-h200\.json: tuned on NVIDIA A100 \(sm_80\), but this is .*H200"):
        chosen()


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is no JSON"),
        ("[]", "format None"),
        ('{"format": 7}', "format 7"),
        ('{"format": 1, "entries": []}', "lacks"),
        ('{"format": 1, "capability": [9, 0], "device": "x", "entries": [{"op": "mlp"}]}', "entry 0"),
    ],
)
def test_broken_files_name_themselves_and_the_remedy(gpu, text, said):
    gpu.parent.mkdir()
    gpu.write_text(text)
    with pytest.raises(TunedFileError, match=rf"nvidia-h200\.json: .*{said}.*delete it and run 'mlpint tune'"):
        chosen()


@pytest.mark.parametrize("change", [{"d": 0}, {"d": "256"}, {"path": "cuda"}, {"config": None}, {"config": {"A": "b"}}])
def test_broken_entries_are_found(gpu, change):
    write(gpu, entry())
    data = json.loads(gpu.read_text())
    data["entries"][0] |= change
    gpu.write_text(json.dumps(data))
    with pytest.raises(TunedFileError, match="entry 0"):
        chosen()


def test_forced_paths_end_with_their_context():
    with dispatch.forced({"mlp": Choice("triton", TILES, "asked")}):
        assert chosen(op="mlp", device="cpu").config == TILES
        with dispatch.forced({"mlp": Choice("torch", None, "asked")}):
            assert chosen(op="mlp", device="cpu").path == "torch"
        assert chosen(op="mlp", device="cpu").path == "triton"
    assert chosen(op="mlp", device="cpu").path == "torch"


def test_a_choice_is_a_constant_of_a_compiled_graph(gpu):
    write(gpu, entry())  # finding it reads a file, which cannot be traced

    def function(x):
        choice = dispatch.choose("ln_linear", d=256, m=8192, j=1, dtype=BF16, device="cuda")
        return x + choice.config["BLOCK_M"]

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert float(compiled(torch.zeros(()))) == 64


def test_explain(gpu):
    write(gpu, entry())
    text = str(kernels.explain("ln_linear", d=256, batch=32, sequence=256, device="cuda"))
    assert text.startswith("ln_linear  triton  triton is the faster at ln_linear d 256 M 8192 J 1 bfloat16")
    block = Block(256, 4)
    lines = str(kernels.explain(block, batch=32, sequence=256, dtype=BF16, device="cuda")).splitlines()
    assert [line.split()[0] for line in lines if " triton " in line] == ["ln_linear"] and len(lines) == 7
    assert all("on the CPU" in line for line in repr(kernels.explain(block, batch=1, sequence=8)).splitlines())
    with pytest.raises(ValueError, match="op = 'gemm': must be of ln_linear"):
        kernels.explain("gemm", d=1, batch=1, sequence=1)
    with pytest.raises(ValueError, match="needs d"):
        kernels.explain("mlp", batch=1, sequence=1)


def test_explain_imports_no_triton():
    code = """
import sys
from mlpint import kernels
kernels.explain("mlp", d=64, batch=1, sequence=8, device="cpu")
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shapes_without_rows_or_layers_have_a_distance():
    assert entry(m=1).distance(256, 0, 0) < entry(m=4).distance(256, 0, 0) < float("inf")
