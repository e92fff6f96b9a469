"""The feed-forward half of a step in one kernel, against torch in float64."""

import pytest
import torch
from torch import library

from kernel_checks import assert_as_good_as_torch, layered
from mlpint.kernels.dispatch import Choice, forced
from mlpint.kernels.mlp import WIDEST, default_config, launch_of, mlp, mlp_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPERATION = torch.ops.mlpint.mlp.default
SMALL = {"BLOCK_M": 16, "BLOCK_H": 16, "num_warps": 4, "num_stages": 2}
# (J, M, D, H): no size a multiple of a block, then all of them
SHAPES = [(2, 21, 37, 43), (1, 1, 3, 1), (2, 16, 32, 64)]


def inputs(shape, dtype, device):
    layers, m, d, hidden = shape
    make = {"dtype": dtype, "device": device}
    norm = layered(layers, d, **make), layered(layers, d, **make)
    up = layered(layers, hidden, d, **make, scale=d**-0.5), layered(layers, hidden, **make)
    down = layered(layers, d, hidden, **make, scale=hidden**-0.5), layered(layers, d, **make)
    return layered(layers, m, d, **make), layered(layers, m, d, **make), *norm, *up, *down


@pytest.fixture
def small():
    with forced({"mlp": Choice("triton", SMALL, "the test says so")}):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, poisoned, small, shape, dtype):
    tensors = inputs(shape, dtype, device)
    for h, activation in ((1.0, "gelu_tanh"), (0.25, "gelu"), (-1.5, "none")):
        exact = mlp_reference(*(t.double() for t in tensors), h, 1e-5, activation)
        in_torch = mlp_reference(*tensors, h, 1e-5, activation)
        assert_as_good_as_torch(OPERATION(*tensors, h, 1e-5, activation), in_torch, exact)


def test_a_step_of_size_one_is_the_ordinary_block(device, small):
    y, x, *rest = inputs(SHAPES[0], torch.float32, device)
    assert torch.equal(OPERATION(y, x * 1e6, *rest, 1.0), OPERATION(y, torch.zeros_like(x), *rest, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_configuration(device, poisoned, dtype):
    tensors = inputs((2, 70, 40, 90), dtype, device)
    exact = mlp_reference(*(t.double() for t in tensors), 0.5)
    assert_as_good_as_torch(OPERATION(*tensors, 0.5), mlp_reference(*tensors, 0.5), exact)


def test_a_configuration_of_a_narrower_network_does_not_spill(device):
    y, x, lw, lb, w1, b1, w2, b2 = inputs((1, 5, 192, 9), torch.bfloat16, device)
    narrow = {"BLOCK_M": 64, "BLOCK_H": 64, "num_warps": 4, "num_stages": 3}
    launch = launch_of(y, x, (lw, lb), (w1, b1), (w2, b2), 1.0, 1e-5, "gelu", torch.empty_like(y), narrow)
    assert default_config(192, torch.bfloat16).items() <= launch.constexprs.items()


def test_opcheck(device):
    library.opcheck(OPERATION, (*inputs((2, 5, 12, 7), torch.float32, device), 0.5, 1e-5, "gelu"))


def test_no_rows(device):
    y, x, *rest = inputs((2, 5, 12, 7), torch.float32, device)
    assert OPERATION(y[:, :0], x[:, :0], *rest, 0.5).shape == (2, 0, 12)


def test_compiles_into_one_graph(device):
    tensors = inputs((2, 5, 12, 7), torch.float32, device)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, 0.5), mlp(*tensors, 0.5))


def test_bad_arguments_say_what_is_wrong(device):
    y, x, *rest = inputs((2, 5, 12, 7), torch.float32, device)
    wide = inputs((1, 2, WIDEST + 1, 3), torch.float32, device)
    for arguments, message in [
        (wide, "mlp holds rows of at most 256 channels and y has 257: use ln_linear and linear_axpy"),
        ((y[0], x, *rest), r"y has 2 dimensions and w1 3, expected \[J, M, D\] and \[J, H, D\]"),
        ((y, x[:, :4], *rest), r"x has shape \(2, 4, 12\), expected \(2, 5, 12\)"),
        ((y, x, *rest[:-1], rest[-1].half()), "b2 is torch.float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            OPERATION(*arguments, 0.5)
