"""Every kernel compiled for sm_80 and sm_90 without a GPU: no stack, no spills, shared memory within limits, tensor
cores where a dot has 16-bit operands. In processes of their own, since this one interprets.
"""

import os
import subprocess
import sys

import pytest

CHECKED = """
import torch, triton, triton.language as tl
from mlpint.kernels import aot
from mlpint.kernels.common import Launch

@triton.jit
def product_kernel(a, b, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * n + i[None, :]
    x = tl.load(a + at)
    tl.store(b + at, tl.dot(x, x).to(x.dtype))

def compiled(size, capability, dtype=torch.bfloat16, **options):
    a = torch.empty(size, size, dtype=dtype, device="meta")
    constexprs = {"SIZE": size, "num_warps": 4, **options}
    return aot.compile_launch(Launch(product_kernel, (1,), (a, a, size), constexprs), capability)

"""


def process(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def run(tmp_path, code):
    path = tmp_path / "checked.py"  # Triton reads a kernel's source from its file
    path.write_text(CHECKED + code)
    result = process(str(path))
    assert result.returncode == 0, result.stdout + result.stderr


def gate(*arguments):
    result = process("-m", "mlpint.kernels.aot", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.timeout(900)  # a minute and a half of one core
def test_every_kernel_in_its_default_configuration():
    out = gate()
    for family in ("ln_linear_fwd_kernel", "ln_linear_rows_fwd_kernel", "linear_axpy_fwd_kernel", "mlp_fwd_kernel"):
        lines = [line for line in out.splitlines() if f" {family} " in line]
        assert {line.split()[0] for line in lines} == {"sm_80", "sm_90"}, out
        assert any("wgmma" in line for line in lines) and any("mma.sync" in line for line in lines), out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_in_every_candidate_configuration():
    gate("--candidates")


def test_dots_are_told_apart(tmp_path):
    run(
        tmp_path,
        """
assert compiled(64, 90).instructions == ("wgmma",)
assert compiled(64, 80).instructions == ("mma.sync",)
assert compiled(32, 90).instructions == ("mma.sync",)
assert compiled(64, 90, dtype=torch.float16).problems == ()
""",
    )


def test_what_is_wrong_is_a_problem(tmp_path):
    run(
        tmp_path,
        """
result = compiled(64, 80, num_warps=1, maxnreg=32)
assert result.stack > 0 and any("bytes of stack" in p for p in result.problems), result
aot.SHARED_MEMORY[90] = 1000
assert any("of shared memory" in p for p in compiled(64, 90).problems)
""",
    )


def test_a_dot_without_tensor_cores_is_a_problem():
    code = """
from mlpint.kernels import aot
dot = "%d = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>"
print(aot.missing_instructions(dot, (), 90), aot.missing_instructions(dot, ("mma.sync",), 80))
"""
    result = process("-c", code)
    assert result.stdout == "['a bf16 dot of 64 rows without wgmma'] []\n", result.stdout + result.stderr


def test_a_kernel_left_out_is_an_error():
    code = """
from mlpint.kernels import aot, mlp
mlp.aot_launches = lambda candidates: iter(())
list(aot.compile_module(mlp))
"""
    result = process("-c", code)
    assert result.returncode == 1 and "mlpint.kernels.mlp.aot_launches leaves out mlp_fwd_kernel" in result.stderr


def test_an_interpreting_process_is_refused():
    result = subprocess.run(
        [sys.executable, "-m", "mlpint.kernels.aot"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "Triton interprets: unset TRITON_INTERPRET" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shipped_estimates_are_what_the_estimator_writes(tmp_path):
    from mlpint.kernels import tuned_files

    result = process("-m", "mlpint.kernels.estimate", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for name in ("estimated-sm80.json", "estimated-sm90.json"):
        ours, written = (tuned_files.load(folder / name) for folder in (tuned_files.SHIPPED, tmp_path))
        assert written.estimated and written.entries == ours.entries, f"{name}: write it anew"
