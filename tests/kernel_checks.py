"""What tests of kernels share: tensors laid out as the solver has them, and the rule for rounding."""

import torch


def layered(*shape, dtype, device, scale=1.0):
    """A random [J, ...] tensor: every other layer and a part of each row of a larger one that is NaN elsewhere."""
    layers, *inner, last = shape
    storage = torch.full((2 * layers + 1, *inner, last + 8), float("nan"), dtype=dtype, device=device)
    view = storage[1::2][:layers, ..., :last]
    view.copy_(torch.randn(shape, device=device) * scale)
    return view


def assert_as_good_as_torch(out, torch_out, exact, atol=2e-6):
    """The error of a kernel is at most twice that of the same formula in plain torch, in its dtype, and a rounding.

    Of few entries plain torch may by chance have rounded all the right way.
    """
    assert out.shape == exact.shape and out.dtype == torch_out.dtype
    error = (out.double() - exact).abs().max().item()
    allowed = 2 * (torch_out.double() - exact).abs().max().item() + atol
    if out.dtype in (torch.float16, torch.bfloat16) and out.numel():
        allowed += torch.finfo(out.dtype).eps / 2 * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
