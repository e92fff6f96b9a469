"""The benchmark on a CPU: what it refuses to time, its clocks' statistics, its files, and every case's kernel."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from mlpint.bench import providers, suite, timing
from mlpint.bench.accuracy import Inaccurate, Judge, check
from mlpint.bench.results import About, read_rows
from mlpint.bench.roofline import Roofline, measure
from mlpint.bench.shapes import Grid, Shape
from mlpint.bench.suite import CASES, Suite
from mlpint.bench.timing import Effort, Timing
from mlpint.cli import main

CPU = torch.device("cpu")
TINY = Shape(32, 2, 9, 2, "causal", torch.float32)
ROOFLINE = Roofline({torch.float32: 1e9, torch.bfloat16: 1e9}, 1e9)


def suite_of(cases, chosen=("eager", "baddbmm"), modes=("forward", "backward", "full"), **keywords):
    grid = Grid((32,), (18,), (1, 3), ("causal", "padded"), ("float32",), 9)
    return Suite(CPU, cases, chosen, modes, grid, ROOFLINE, About("a CPU"), Effort(0.0, 2, 2), **keywords)


def test_every_case_is_right_in_plain_torch():
    """Batched torch against autograd in float64, with J layers, masks and strided parameters."""
    run = suite_of(list(CASES))
    list(run.run())
    assert run.failures == []
    assert {r.kernel_name for r in run.rows} == set(CASES)
    assert {r.kernel_operation_mode for r in run.rows if r.kernel_name == "block"} == {"forward", "backward", "full"}
    assert {(r.extra["J"], r.extra["mask"]) for r in run.rows if r.kernel_name == "block"} == {
        (1, "causal"), (1, "padded"), (3, "causal"), (3, "padded"),
    }  # fmt: skip


def test_bfloat16_and_full_attention():
    grid = Grid((32,), (18,), (2,), ("full",), ("bfloat16",), 9)
    run = Suite(CPU, ["block"], ["eager", "baddbmm"], ["forward"], grid, ROOFLINE, About("a CPU"), Effort(0.0, 2, 2))
    list(run.run())
    assert run.failures == [] and len(run.rows) == 2


def test_wrong_results_are_not_timed(monkeypatch):
    case = CASES["rms_linear"]
    monkeypatch.setattr(case, "batched", lambda inputs, mode: lambda: (inputs["x"].repeat(1, 1, 3),), raising=False)
    timed = []
    monkeypatch.setattr(timing, "host_wall", lambda call, *_: timed.append(call) or [1.0])
    run = suite_of(["rms_linear"])
    lines = list(run.run())
    assert {row.kernel_provider for row in run.rows} == {"eager"} and len(timed) == 2
    assert len(run.failures) == 2 and "baddbmm wrong: result 0 is off by" in run.failures[0]
    assert any("not timed" in line for line in lines)


def test_a_provider_that_fails_does_not_stop_the_others(monkeypatch):
    def broken(inputs, mode):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(CASES["average"], "batched", broken, raising=False)
    run = suite_of(["average"], ("baddbmm", "eager"))
    list(run.run())
    assert {row.kernel_provider for row in run.rows} == {"eager"}
    assert run.failures[0].endswith("baddbmm failed (RuntimeError): out of memory")


def test_deadline_skips_and_counts():
    run = suite_of(["rms_linear"], deadline=-1.0)
    assert list(run.run()) == [] and run.skipped == 2


def test_rule_of_accuracy():
    exact = [torch.tensor([1.0, -2.0], dtype=torch.float64)]
    plain = [torch.tensor([1.01, -2.0])]
    assert check([torch.tensor([1.0, -2.015])], plain, exact, torch.float32) == pytest.approx(0.0075, rel=1e-3)
    for wrong in ([1.0, -2.03], [float("nan"), -2.0], [1.0]):
        with pytest.raises(Inaccurate):
            check([torch.tensor(wrong)], plain, exact, torch.float32)
    with pytest.raises(Inaccurate, match="2 results"):
        check([plain[0], plain[0]], plain, exact, torch.float32)


def test_eager_itself_is_judged():
    judge = Judge(CASES["rms_linear"], TINY, "forward", CPU)
    call = providers.make("eager", CASES["rms_linear"], TINY, CASES["rms_linear"].inputs(TINY, CPU), "forward")
    assert judge.check("eager", call()) < 1e-6
    with pytest.raises(Inaccurate):
        judge.check("eager", [tuple(1.001 * t for t in layer) for layer in call()])


def test_statistics():
    timings = Timing.of([0.001 * n for n in range(11, 0, -1)])
    assert (timings.p50, timings.p20, timings.p80) == pytest.approx((6.0, 3.0, 9.0))
    assert Timing.of([0.002]) == Timing(2.0, 2.0, 2.0)
    assert len(timing.host_wall(lambda: None, CPU, Effort(0.0, 3, 9))) == 3
    assert len(timing.host_wall(lambda: None, CPU, Effort(9.0, 3, 9))) == 9


def test_roofline_takes_the_slower_of_products_and_memory():
    assert ROOFLINE.seconds(2e9, 1e9, torch.float32) == 2.0 and ROOFLINE.seconds(1e9, 3e9, torch.float32) == 3.0
    ceilings = measure(CPU, [torch.float32], small=True)
    assert ceilings.flops[torch.float32] > 1e6 and ceilings.bandwidth > 1e6 and "GB/s" in str(ceilings)


def test_operations_of_a_block():
    shape = Shape(64, 1, 128, 3, "full")
    assert CASES["block"].flops(shape, "forward") == 3 * (2 * 128 * 12 * 64**2 + 4 * 128**2 * 64)


def test_compiled_providers():
    """A backward that is run again and again on what one compiled forward has saved."""
    case = CASES["ln_backward"]
    judge = Judge(case, TINY, "backward", CPU)
    call = providers.make("compile", case, TINY, case.inputs(TINY, CPU), "backward")
    for _ in range(2):
        assert judge.check("compile", call()) < 1e-5


def test_command_writes_csv_and_plots(tmp_path, capsys):
    flags = ["--device", "cpu", "--out", str(tmp_path), "--kernels", "block,average", "--d", "32", "--m", "32"]
    flags += ["--j", "1,2", "--masks", "full", "--sequence", "16", "--modes", "forward", "--seconds", "0.001"]
    assert main(["bench", *flags]) == 0
    printed = capsys.readouterr().out
    for left_out in ("compile (", "compile_graph (CUDA graphs need a GPU)", "ours (without a GPU"):
        assert f"left out: {left_out}" in printed
    assert "measured ceilings" in printed
    rows = read_rows(tmp_path / "bench.csv")
    assert len(rows) == 2 * 2 * 2 and (tmp_path / "host_wall_float32.png").stat().st_size > 1000
    header = (tmp_path / "bench.csv").read_text().splitlines()[0]
    assert header.startswith(
        "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,x_value,y_value_50,"
        "y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,"
    )
    for row in rows:
        assert row.y_value_20 <= row.y_value_50 <= row.y_value_80 and row.x_value == 32
        assert row.torch_version == torch.__version__ and row.extra["M"] == 32 and row.extra["flops"] > 0


def test_command_reads_and_never_tunes(tmp_path, monkeypatch):
    monkeypatch.setattr("mlpint.kernels.tuned_files.write", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--device", "cpu", "--kernels", "rms_linear", "--d", "32", "--m", "16", "--seconds", "0.001"]
    assert main(["bench", *flags, "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--device", "cuda"], "torch sees no GPU"),
        (["--kernels", "gemm"], "kernels has 'gemm': must be of ln_linear"),
        (["--providers", "ours"], "none of them runs on this cpu"),
        (["--d", "two"], "d = 'two'"),
        (["--d", "200"], "d = 200: must be a multiple of 64"),
        (["--m", "0"], "m = 0"),
        (["--m", "40", "--sequence", "32"], "m = 40: must be a multiple of the sequence, 32"),
        (["--dtypes", "int8"], "dtypes has 'int8'"),
        (["--suite", "figures"], "needs a GPU; add --small"),
    ],
)
def test_bad_flags(flags, said, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    device = [] if "--device" in flags else ["--device", "cpu"]
    assert main(["bench", *device, *flags]) == 2
    assert said in capsys.readouterr().err


def test_figures_run_end_to_end(tmp_path, capsys):
    flags = ["--suite", "figures", "--device", "cpu", "--small", "--seconds", "0.001", "--out", str(tmp_path)]
    assert main(["bench", *flags]) == 0
    printed = capsys.readouterr().out
    for name in (
        "block forward",
        "intervals at once",
        "Llama's block",
        "of Llama's at once",
        "(1,1) training step",
        "prolongation",
    ):
        assert re.search(rf"^.*{re.escape(name)}.* \d+\.\d\d ", printed, re.MULTILINE), printed
    assert "FAILED" not in printed and "nan" not in printed
    assert len((tmp_path / "figures.csv").read_text().splitlines()) == 1 + 9


def test_a_figure_that_fails_is_a_line(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(suite.CASES["block"], "batched", broken, raising=False)
    monkeypatch.setattr(suite.CASES["block"], "kernel", broken, raising=False)
    flags = ["--suite", "figures", "--device", "cpu", "--small", "--seconds", "0.001", "--out", str(tmp_path)]
    assert main(["bench", *flags]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.count("FAILED: RuntimeError: no such kernel") == 4 and "Llama" in printed and "prolongation" in printed
    )


def test_kernels_in_the_interpreter():
    """Each case's kernel gives the right result, and asks dispatch with the key under which the case is tuned."""
    code = """
import json, torch
from mlpint.bench import providers
from mlpint.bench.accuracy import Judge
from mlpint.bench.shapes import Shape
from mlpint.bench.suite import CASES
from mlpint.kernels import dispatch

torch.set_num_threads(1)
asked, choose = [], dispatch.choose
def spy(op, **shape):
    asked.append([op, shape["d"], shape["m"], shape["j"]])
    return choose(op, **shape)
dispatch.choose = spy
by_case = {}
for name, case in CASES.items():
    for mode in (m for m in case.modes if name not in ("block", "llama_block")):
        shape, device = Shape(32, 2, 9, 2, "padded" if case.masked else "causal", torch.float32), torch.device("cpu")
        asked.clear()
        call = providers.make("triton", case, shape, case.inputs(shape, device), mode)
        error = Judge(case, shape, mode, device).check("triton", call())
        key = case.key(shape, mode)
        configs = case.configs(shape, mode)
        assert configs and all(isinstance(c, dict) for c in configs), name
        by_case[f"{name} {mode}"] = (error, [key.op, key.d, key.m, key.j] in asked)
print(json.dumps(by_case))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    by_case = json.loads(result.stdout)
    assert len(by_case) == 15 and all(right for _, right in by_case.values()), by_case
