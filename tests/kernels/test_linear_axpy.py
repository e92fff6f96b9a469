"""Linear map + residual step, against torch in float64."""

import pytest
import torch
from torch import library

from kernel_checks import assert_as_good_as_torch, layered
from mlpint.kernels.dispatch import Choice, forced
from mlpint.kernels.linear_axpy import linear_axpy, linear_axpy_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPERATION = torch.ops.mlpint.linear_axpy.default
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
# (J, M, K, N): no size a multiple of a block, then all of them
SHAPES = [(2, 21, 43, 37), (1, 1, 1, 1), (2, 32, 32, 64)]


def inputs(shape, dtype, device):
    layers, m, k, n = shape
    make = {"dtype": dtype, "device": device}
    weight = layered(layers, n, k, **make, scale=k**-0.5)
    y, x = layered(layers, m, n, **make), layered(layers, m, n, **make)
    return layered(layers, m, k, **make), weight, layered(layers, n, **make), y, x


def in_torch(*arguments):
    """The reference on copies without gaps: torch's product in bfloat16 by AMX reads what lies between the rows."""
    *tensors, h = arguments
    return linear_axpy_reference(*(t.contiguous() for t in tensors), h)


@pytest.fixture
def small():
    with forced({"linear_axpy": Choice("triton", SMALL, "the test says so")}):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, poisoned, small, shape, dtype):
    tensors = inputs(shape, dtype, device)
    for h in (1.0, 0.25, -1.5):
        exact = linear_axpy_reference(*(t.double() for t in tensors), h)
        assert_as_good_as_torch(OPERATION(*tensors, h), in_torch(*tensors, h), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_state_within_and_before_the_step(device, poisoned, small, dtype):
    a, weight, bias, _, x = inputs(SHAPES[0], dtype, device)
    for h in (1.0, 0.3):
        out = OPERATION(a, weight, bias, x, x, h)
        exact = x.double() + h * (torch.einsum("jmk,jnk->jmn", a.double(), weight.double()) + bias.double()[:, None])
        assert_as_good_as_torch(out, in_torch(a, weight, bias, x, x, h), exact)


def test_bfloat16_is_rounded_once(device):
    tensors = inputs((1, 16, 16, 32), torch.bfloat16, device)
    exact = linear_axpy_reference(*(t.double() for t in tensors), 0.5)
    ulp = 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((OPERATION(*tensors, 0.5).double() - exact).abs() <= 0.501 * ulp + 1e-5).all()


def test_a_step_of_size_one_is_the_ordinary_block(device):
    """Exactly: x drops out, even where it is so large that y - x would lose y's digits."""
    a, weight, bias, y, x = inputs((2, 5, 12, 7), torch.float32, device)
    without = OPERATION(a, weight, bias, y, torch.zeros_like(x), 1.0)
    assert torch.equal(OPERATION(a, weight, bias, y, x * 1e6, 1.0), without)


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_configuration(device, poisoned, dtype):
    tensors = inputs((2, 70, 150, 66), dtype, device)
    exact = linear_axpy_reference(*(t.double() for t in tensors), 0.5)
    assert_as_good_as_torch(OPERATION(*tensors, 0.5), linear_axpy_reference(*tensors, 0.5), exact)


def test_opcheck(device):
    tensors = inputs((2, 5, 12, 7), torch.float32, device)
    library.opcheck(OPERATION, (*tensors, 0.5))
    library.opcheck(OPERATION, (*tensors[:3], tensors[4], tensors[4], 0.5))


def test_no_rows(device):
    a, weight, bias, y, x = inputs((2, 5, 12, 7), torch.float32, device)
    assert OPERATION(a[:, :0], weight, bias, y[:, :0], x[:, :0], 0.5).shape == (2, 0, 7)


def test_compiles_into_one_graph_and_the_step_size_is_not_baked_in(device):
    tensors = inputs((2, 5, 12, 7), torch.float32, device)
    compiled = torch.compile(linear_axpy, fullgraph=True, backend="aot_eager")
    for h in (0.5, 0.75):
        torch.testing.assert_close(compiled(*tensors, h), linear_axpy(*tensors, h))


def test_bad_arguments_say_what_is_wrong(device):
    a, weight, bias, y, x = inputs((2, 5, 12, 7), torch.float32, device)
    for arguments, message in [
        ((a[0], weight, bias, y, x), r"a has 2 dimensions and weight 3, expected \[J, M, K\] and \[J, N, K\]"),
        ((a, weight[:1], bias, y, x), r"weight has shape \(1, 7, 12\), expected \(2, 7, 12\)"),
        ((a, weight, bias, y.half(), x), "y is torch.float16"),
        ((a, weight, bias, y, x[:, :4]), r"x has shape \(2, 4, 7\), expected \(2, 5, 7\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            OPERATION(*arguments, 0.5)
