"""Norm, gated way up, and the gate's backward, against torch in float64."""

import pytest
import torch
from torch import library

from kernel_checks import assert_as_good_as_torch, layered
from mlpint.kernels import gated_backward, gated_linear
from mlpint.kernels.dispatch import Choice, forced

DTYPES = [torch.float32, torch.bfloat16]
OPERATION, TRAIN = torch.ops.mlpint.gated_linear.default, torch.ops.mlpint.gated_linear_train.default
BACKWARD = torch.ops.mlpint.gated_backward.default
CONFIG = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
# (J, M, D, F): no size a multiple of a block, then all of them
SHAPES = [(2, 21, 37, 43), (1, 1, 5, 1), (1, 16, 16, 32)]
NORMS = ["rms", "rms, all biases", "layer"]


def inputs(shape, dtype, device, norm="rms"):
    layers, m, d, f = shape
    make = {"dtype": dtype, "device": device}
    x, weight = layered(layers, m, d, **make), layered(layers, 2 * f, d, **make, scale=d**-0.5)
    ln_bias = layered(layers, d, **make) if norm == "layer" else None
    bias = layered(layers, 2 * f, **make) if norm != "rms" else None
    return x, layered(layers, d, **make), ln_bias, weight, bias


def wide(tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.fixture
def small_blocks():
    with forced({"gated_linear": Choice("triton", CONFIG, "the test says so")}):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, poisoned, small_blocks, shape, norm, dtype):
    tensors = inputs(shape, dtype, device, norm)
    for activation in ("silu", "gelu") if norm == "rms" else ("gelu_tanh",):
        results = TRAIN(*tensors, 1e-5, activation)
        in_torch = gated_linear.gated_linear_train_reference(*tensors, 1e-5, activation)
        exact = gated_linear.gated_linear_train_reference(*wide(tensors), 1e-5, activation)
        for got, by_torch, true in zip(
            (results[0], results[3]), (in_torch[0], in_torch[3]), (exact[0], exact[3]), strict=True
        ):
            assert_as_good_as_torch(got, by_torch, true)
        for statistic, true in zip(results[1:3], exact[1:3], strict=True):
            assert statistic.dtype == torch.float32
            torch.testing.assert_close(statistic.double(), true, rtol=1e-5, atol=1e-6)
        tolerance = 0.0 if device == "cpu" else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(OPERATION(*tensors, 1e-5, activation), results[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 21, 43), (1, 1, 1), (2, 16, 256)])
def test_backward_of_the_gate(device, poisoned, shape, dtype):
    layers, m, f = shape
    dy, pre = (torch.randn(layers, m, n, device=device).to(dtype) for n in (f, 2 * f))
    for activation in ("silu", "gelu_tanh", "gelu", "relu"):
        exact = gated_backward.gated_backward_reference(dy.double(), pre.double(), activation)
        in_torch = gated_backward.gated_backward_reference(dy, pre, activation)
        assert_as_good_as_torch(BACKWARD(dy, pre, activation), in_torch, exact)


def test_default_configurations_and_no_rows(device, poisoned):
    tensors = inputs((2, 70, 48, 130), torch.bfloat16, device)
    in_torch, exact = gated_linear.gated_linear_reference(*tensors), gated_linear.gated_linear_reference(*wide(tensors))
    assert_as_good_as_torch(OPERATION(*tensors), in_torch, exact)
    assert OPERATION(tensors[0][:, :0], *tensors[1:]).shape == (2, 0, 130)
    assert BACKWARD(torch.empty(2, 0, 8, device=device), torch.empty(2, 0, 16, device=device)).shape == (2, 0, 16)


def test_opcheck_and_compile(device):
    tensors = inputs((2, 5, 12, 7), torch.float32, device, "layer")
    library.opcheck(OPERATION, (*tensors, 1e-5, "silu"))
    library.opcheck(TRAIN, inputs((2, 5, 12, 7), torch.float32, device))
    dy, pre = torch.randn(2, 5, 7, device=device), torch.randn(2, 5, 14, device=device)
    library.opcheck(BACKWARD, (dy, pre, "silu"))

    def function(dy, *tensors):
        return gated_backward.gated_backward(dy, gated_linear.gated_linear_train(*tensors)[3])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(dy, *tensors), function(dy, *tensors))


def test_bad_arguments_say_what_is_wrong(device):
    x, ln_weight, ln_bias, weight, bias = inputs((2, 5, 12, 7), torch.float32, device)
    dy, pre = torch.randn(2, 5, 7, device=device), torch.randn(2, 5, 14, device=device)
    for call, message in [
        (lambda: OPERATION(x, ln_weight, ln_bias, weight[:, 1:], bias), r"expected \[J, M, D\] and \[J, 2 F, D\]"),
        (lambda: OPERATION(x, ln_weight[:, 1:], ln_bias, weight, bias), r"ln_weight has shape \(2, 11\)"),
        (lambda: OPERATION(x, ln_weight, ln_bias, weight.half(), bias), "weight is torch.float16"),
        (lambda: OPERATION(x, ln_weight, ln_bias, weight, bias, 1e-5, "selu"), "activation is 'selu'"),
        (lambda: BACKWARD(dy, pre[..., 1:]), r"pre torch.float32 \(2, 5, 13\): expected"),
        (lambda: BACKWARD(dy, pre, "none"), "this is for gates"),
        (lambda: BACKWARD(dy.mT.contiguous().mT, pre), "must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
