"""Device functions shared by the kernels, and the checks of their arguments, against torch."""

import pytest
import torch
import triton
import triton.language as tl

from mlpint.kernels import common


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = common.to_float(tl.load(x + i, mask=i < n, other=0.0))
    tl.store(y + i, common.round_to(v, y.dtype.element_ty), mask=i < n)


@triton.jit
def activate_kernel(x, y, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = common.activate(tl.load(x + i, mask=i < n, other=0.0), ACTIVATION)
    tl.store(y + i, v, mask=i < n)


@triton.jit
def dot_kernel(a, b, c, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    tl.store(c + at, common.dot(tl.load(a + at), tl.load(b + at), acc, "ieee"))


@triton.jit
def tile_kernel(out, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    layer, m, n = common.tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    tl.store(out + 3 * tl.program_id(0) + tl.arange(0, 1), layer)
    tl.store(out + 3 * tl.program_id(0) + 1 + tl.arange(0, 1), m)
    tl.store(out + 3 * tl.program_id(0) + 2 + tl.arange(0, 1), n)


def every(bits: torch.Tensor, dtype, device):
    return bits.view(dtype).to(device)


def cast(x, dtype):
    y = torch.empty_like(x, dtype=dtype)
    cast_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), BLOCK=4096)
    return y


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


def test_every_bfloat16_becomes_its_float32(device):
    x = every(torch.arange(-(2**15), 2**15).to(torch.int16), torch.bfloat16, device)
    assert same(cast(x, torch.float32), x.float())


def test_float32_is_rounded_to_nearest_even_bfloat16(device):
    ends = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    patterns = (torch.arange(0, 2**16, 7)[:, None] * 2**16 + ends).flatten()
    patterns = torch.where(patterns < 2**31, patterns, patterns - 2**32).to(torch.int32)
    x = every(patterns, torch.float32, device)
    assert same(cast(x, torch.bfloat16), x.bfloat16())


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter computes in numpy
@pytest.mark.parametrize("activation, approximate", [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu(device, activation, approximate):
    x = torch.cat([torch.linspace(-12, 12, 999), torch.tensor([-1e30, 0.0, 1e30])]).to(device)
    y = torch.full_like(x, float("nan"))
    activate_kernel[(1,)](x, y, x.numel(), ACTIVATION=activation, BLOCK=1024)
    expected = torch.nn.functional.gelu(x.double(), approximate=approximate)
    torch.testing.assert_close(y.double(), expected, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_accumulates_in_float32(device, dtype):
    a, b = (torch.randn(32, 32, device=device).to(dtype) for _ in range(2))
    c = torch.empty(32, 32, device=device)
    dot_kernel[(1,)](a, b, c, SIZE=32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiles_m, tiles_n", [(1, 1), (5, 3), (4, 2), (3, 7)])
def test_programs_cover_every_tile_of_every_layer_once(device, tiles_m, tiles_n):
    layers, block = 3, 16
    count = layers * tiles_m * tiles_n
    out = torch.full((count, 3), -1, dtype=torch.int64, device=device)
    tile_kernel[(count,)](out, tiles_m * block - 3, tiles_n * block - 5, BLOCK_M=block, BLOCK_N=block, GROUP_M=4)
    expected = {(j, m, n) for j in range(layers) for m in range(tiles_m) for n in range(tiles_n)}
    assert {tuple(row) for row in out.tolist()} == expected


def test_float32_products_are_exact_unless_torch_is_told_otherwise():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert common.input_precision() == "ieee"
        matmul.fp32_precision = "tf32"
        assert common.input_precision() == "tf32"
    finally:
        matmul.fp32_precision = before


def test_check_names_what_is_wrong():
    x = torch.empty(2, 3, 4)
    common.check("weight", torch.empty(5, 4)[:, None], (5, 1, 4), like=x)
    for bad, message in [
        (torch.empty(2, 4, 3), r"weight has shape \(2, 4, 3\), expected \(2, 3, 4\)"),
        (torch.empty(2, 3, 4).bfloat16(), "weight is torch.bfloat16 on cpu, expected torch.float32 on cpu"),
        (torch.empty(2, 4, 3).mT, "weight's last dimension has stride 3, expected 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            common.check("weight", bad, (2, 3, 4), like=x)
    with pytest.raises(ValueError, match="activation is 'selu', expected one of none, gelu_tanh, gelu, relu, silu"):
        common.check_activation("selu")
