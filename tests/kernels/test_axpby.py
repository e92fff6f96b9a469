"""a x + b y with its squared norm, against torch in float64."""

import pytest
import torch
from torch import library

from mlpint.kernels.axpby import axpby_norm, axpby_norm_reference

LAYOUTS = {
    "vector": lambda x: x((37,)),
    "matrix": lambda x: x((5, 37)),
    "dense": lambda x: x((3, 5, 37)),
    "many blocks": lambda x: x((2, 41, 133)),
    "every other layer": lambda x: x((6, 5, 37))[1::2],
    "every layer the same": lambda x: x((1, 5, 37)).expand(3, 5, 37),
    "padded rows": lambda x: x((3, 5, 40))[..., :37],
    "four dimensions": lambda x: x((6, 2, 5, 37))[::2],
    "one row": lambda x: x((3, 4, 37))[:, 1:2],
}


def state(layout, dtype, device):
    return LAYOUTS[layout](lambda shape: torch.randn(shape, device=device).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_axpby_norm(device, poisoned, layout, dtype):
    x, y = state(layout, dtype, device), state(layout, dtype, device).flip(0).contiguous()
    for first, second in ((x, y), (y, x)):
        out, norm = axpby_norm(0.75, first, -2.0, second)
        expected = 0.75 * first.double() - 2.0 * second.double()
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
        assert out.dtype == dtype and norm.dtype == torch.float32 and norm.shape == ()
        torch.testing.assert_close(norm.double(), out.double().square().sum(), rtol=1e-5, atol=0)
        reference, reference_norm = axpby_norm_reference(0.75, first, -2.0, second)
        torch.testing.assert_close(out, reference)
        torch.testing.assert_close(norm, reference_norm, rtol=1e-5, atol=0)


def test_bfloat16_is_rounded_once(device):
    x, y = state("dense", torch.bfloat16, device), state("dense", torch.bfloat16, device)
    assert torch.equal(axpby_norm(1.0, x, -1.0, y)[0], (x.float() - y.float()).bfloat16())


def test_nothing_is_nothing_and_what_is_not_finite_shows(device):
    empty = torch.empty(2, 0, 5, device=device)
    out, norm = axpby_norm(1.0, empty, 1.0, empty)
    assert out.shape == empty.shape and norm.item() == 0
    x = torch.zeros(2, 3, 37, device=device)
    x[1, 2, 36] = float("inf")
    assert axpby_norm(1.0, x, 1.0, torch.zeros_like(x))[1].item() == float("inf")


def test_opcheck(device):
    for layout in ("dense", "padded rows"):
        x = state(layout, torch.float32, device)
        library.opcheck(torch.ops.mlpint.axpby_norm, (0.5, x, 1.5, x.flip(0)))


def test_compile(device):
    x, y = state("dense", torch.float32, device), state("dense", torch.float32, device)
    run = torch.compile(lambda x, y: axpby_norm(1.0, x * 2, -1.0, y)[1].sqrt(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, y), torch.linalg.vector_norm(2 * x - y))


def test_errors(device):
    x = torch.zeros(2, 3, 4, device=device)
    for y, message in [
        (x[:1], r"y has shape \(1, 3, 4\), expected \(2, 3, 4\)"),
        (x.double(), "y is torch.float64"),
        (torch.zeros(2, 4, 3, device=device).mT, "y's last dimension has stride 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            axpby_norm(1.0, x, 1.0, y)
    uneven = torch.zeros(2, 3, 2, 4, device=device).transpose(1, 2)
    with pytest.raises(ValueError, match="x has strides .* rows must be evenly spaced"):
        axpby_norm(1.0, uneven, 1.0, uneven)
