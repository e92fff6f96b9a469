"""LayerNorm + linear + activation, against torch in float64."""

import pytest
import torch
from torch import library

from kernel_checks import assert_as_good_as_torch, layered
from mlpint.kernels import ln_linear
from mlpint.kernels.dispatch import Choice, forced

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPERATION = torch.ops.mlpint.ln_linear.default
TRAIN = torch.ops.mlpint.ln_linear_train.default
STREAMED = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
ROWS = {"BLOCK_M": 16, "BLOCK_N": 32, "TILES": 2, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
# (J, M, D, N): no size a multiple of a block, then all of them
SHAPES = [(2, 21, 37, 43), (1, 1, 5, 1), (2, 32, 32, 64)]


def inputs(shape, dtype, device, mean=0.0, biases=True):
    layers, m, d, n = shape
    make = {"dtype": dtype, "device": device}
    x = layered(layers, m, d, **make).add_(mean)
    norm = layered(layers, d, **make), layered(layers, d, **make) if biases else None
    weight = layered(layers, n, d, **make, scale=d**-0.5)
    return x, *norm, weight, layered(layers, n, **make) if biases else None


def wide(tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.fixture(params=[STREAMED, ROWS], ids=["streamed", "rows"])
def config(request):
    with forced({"ln_linear": Choice("triton", request.param, "the test says so")}):
        yield request.param


@pytest.mark.parametrize(("biases", "dtype"), [*((True, dtype) for dtype in DTYPES), (False, torch.bfloat16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, poisoned, config, shape, biases, dtype):
    tensors = inputs(shape, dtype, device, biases=biases)
    for activation in ("none", "gelu_tanh", "gelu", "relu") if biases else ("none", "silu"):
        y = OPERATION(*tensors, 1e-5, activation)
        in_torch = ln_linear.ln_linear_reference(*tensors, 1e-5, activation)
        exact = ln_linear.ln_linear_reference(*wide(tensors), 1e-5, activation)
        assert_as_good_as_torch(y, in_torch, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [True, False], ids=["layer", "rms"])
def test_training_form_keeps_statistics_and_pre_activation(device, poisoned, config, biases, dtype):
    tensors = inputs(SHAPES[0], dtype, device, biases=biases)
    for activation in ("none", "gelu_tanh"):
        results = TRAIN(*tensors, 1e-5, activation)
        in_torch = ln_linear.ln_linear_train_reference(*tensors, 1e-5, activation)
        exact = ln_linear.ln_linear_train_reference(*wide(tensors), 1e-5, activation)
        # In the interpreter to the last bit; a compiler may contract the two forms' products and sums differently.
        tolerance = 0.0 if device == "cpu" else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(results[0], OPERATION(*tensors, 1e-5, activation), rtol=tolerance, atol=tolerance)
        for statistic, true in zip(results[1:3], exact[1:3], strict=True):
            assert statistic.dtype == torch.float32
            torch.testing.assert_close(statistic.double(), true, rtol=1e-5, atol=1e-6)
        if activation == "none":
            assert results[3].numel() == 0
        else:
            assert_as_good_as_torch(results[3], in_torch[3], exact[3])


def test_rows_far_from_zero_lose_no_digits(device, config):
    """Mean 1000, deviation 1: a variance from E[x^2] - E[x]^2 in float32 would be wrong in the second digit."""
    tensors = inputs((1, 20, 60, 8), torch.float32, device, mean=1000.0)
    y, _, rstd, _ = TRAIN(*tensors)
    exact = ln_linear.ln_linear_train_reference(*wide(tensors))
    torch.testing.assert_close(rstd.double(), exact[2], rtol=1e-4, atol=0)
    torch.testing.assert_close(y.double(), exact[0], rtol=0, atol=5e-4)  # x itself has 6e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_configuration(device, poisoned, dtype):
    for d in (48, ln_linear.WIDEST_ROW + 1):
        tensors = inputs((2, 70, d, 130), dtype, device)
        in_torch = ln_linear.ln_linear_reference(*tensors)
        assert_as_good_as_torch(OPERATION(*tensors), in_torch, ln_linear.ln_linear_reference(*wide(tensors)))


def test_rows_too_wide_to_hold_are_streamed(device):
    tensors = inputs((1, 5, ln_linear.WIDEST_ROW + 1, 9), torch.float32, device)
    with forced({"ln_linear": Choice("triton", ROWS, "tuned for narrower rows")}):
        y = OPERATION(*tensors)
    torch.testing.assert_close(y, ln_linear.ln_linear_reference(*tensors), rtol=1e-4, atol=1e-5)


def test_opcheck(device):
    tensors = inputs((2, 5, 12, 7), torch.float32, device)
    library.opcheck(OPERATION, (*tensors, 1e-5, "gelu"))
    library.opcheck(TRAIN, (*tensors, 1e-5, "gelu"))
    library.opcheck(TRAIN, (*tensors, 1e-5, "none"))
    library.opcheck(TRAIN, inputs((2, 5, 12, 7), torch.float32, device, biases=False))


def test_no_rows(device):
    tensors = inputs((2, 5, 12, 7), torch.float32, device)
    assert OPERATION(tensors[0][:, :0], *tensors[1:]).shape == (2, 0, 7)


def test_compiles_into_one_graph(device):
    tensors = inputs((2, 5, 12, 7), torch.float32, device)

    def function(*tensors):
        return ln_linear.ln_linear(*tensors, 1e-5, "gelu") + ln_linear.ln_linear_train(*tensors, 1e-5, "gelu")[3]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


def test_bad_arguments_say_what_is_wrong(device):
    x, *rest = inputs((2, 5, 12, 7), torch.float32, device)
    for arguments, message in [
        ((x[0], *rest), r"x has 2 dimensions and weight 3, expected \[J, M, D\] and \[J, N, D\]"),
        ((x[..., :11], *rest), r"ln_weight has shape \(2, 12\), expected \(2, 11\)"),
        ((x, *rest[:-1], rest[-1].half()), "bias is torch.float16"),
        ((x, *rest, 1e-5, "selu"), "activation is 'selu'"),
        ((x.mT.contiguous().mT, *rest), "x's last dimension has stride 5, expected 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            OPERATION(*arguments)
