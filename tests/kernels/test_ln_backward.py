"""Backward of layer normalisation with the residual's gradient, against autograd in float64."""

import pytest
import torch
from torch import library

from mlpint.kernels import ln_backward
from mlpint.kernels.ln_backward import ln_backward_add, ln_backward_add_reference

EPS = 1e-5
CONFIGS = [{"BLOCK_M": 1, "ROWS": 4, "num_warps": 4}, {"BLOCK_M": 8, "ROWS": 16, "num_warps": 4}]


def inputs(j, m, d, dtype, device, strided=False):
    """(dy, x, weight [J, D], residual_grad), with gaps between layers and between rows if `strided`."""

    def rows():
        if not strided:
            return torch.randn(j, m, d, device=device).to(dtype)
        return torch.randn(2 * j, m, 3, d, device=device).to(dtype)[1::2, :, 1]

    weight = torch.randn(3 * j, d, device=device).to(dtype)[::3]
    return rows(), rows() + 0.5, weight, rows()


def statistics(x, rms=False):
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if rms:
        return None, (x.square().mean(-1) + EPS).rsqrt()
    return x.mean(-1), (x.var(-1, unbiased=False) + EPS).rsqrt()


def expected(dy, x, weight, residual_grad, rms=False):
    """What autograd makes of it in float64."""
    dy, x, weight, residual_grad = (t.double() for t in (dy, x, weight, residual_grad))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    bias = torch.zeros_like(weight, requires_grad=True)
    if rms:
        y = [torch.nn.functional.rms_norm(x[i], x.shape[-1:], weight[i], EPS) + bias[i] for i in range(len(x))]
    else:
        y = [torch.nn.functional.layer_norm(x[i], x.shape[-1:], weight[i], bias[i], EPS) for i in range(len(x))]
    return torch.autograd.grad((torch.stack(y), x), (x, weight, bias), (dy, residual_grad))


@pytest.mark.parametrize("config", CONFIGS, ids=["rows", "blocks"])
@pytest.mark.parametrize(("strided", "rms"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 37, 40), (2, 64, 128), (2, 19, 1)])
def test_gradients(device, poisoned, monkeypatch, shape, strided, rms, config):
    monkeypatch.setattr(ln_backward, "default_config", lambda *_: config)
    dy, x, weight, residual_grad = inputs(*shape, torch.float32, device, strided)
    results = ln_backward_add(dy, x, *statistics(x, rms), weight, residual_grad)
    for a, b in zip(results, expected(dy, x, weight, residual_grad, rms), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_default_configurations_and_no_residual(device, poisoned):
    for d in (24, 300, 1500):
        dy, x, weight, residual_grad = inputs(2, 5, d, torch.float32, device)
        results = ln_backward_add(dy, x, *statistics(x), weight, None)
        for a, b in zip(results, expected(dy, x, weight, 0 * residual_grad), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_as_good_as_torch(device, poisoned, dtype):
    arguments = inputs(2, 37, 40, dtype, device)
    dy, x, weight, residual_grad = arguments
    for rms in (False, True):
        results = ln_backward_add(dy, x, *statistics(x, rms), weight, residual_grad)
        reference = ln_backward_add_reference(dy, x, *statistics(x, rms), weight, residual_grad)
        for a, by_torch, b in zip(results, reference, expected(*arguments, rms), strict=True):
            assert a.dtype == dtype
            limit = 2 * (by_torch.double() - b).abs().max() + 1e-5
            assert (a.double() - b).abs().max() <= limit


def test_the_sums_are_the_same_every_time(device):
    dy, x, weight, residual_grad = inputs(2, 300, 40, torch.float32, device)
    runs = [ln_backward_add(dy, x, *statistics(x), weight, residual_grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Norm(torch.autograd.Function):
    """x + 0 and its normalisation, with the kernels' backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        mean, rstd = statistics(x)
        ctx.save_for_backward(x, mean, rstd, weight)
        return (x - mean[..., None]) * rstd[..., None] * weight[:, None] + bias[:, None], x.clone()

    @staticmethod
    def backward(ctx, dy, residual_grad):
        x, mean, rstd, weight = ctx.saved_tensors
        return ln_backward_add(dy, x, mean, rstd, weight, residual_grad)


def test_gradcheck(device):
    _, x, weight, _ = (t.double().requires_grad_() for t in inputs(2, 2, 3, torch.float32, device))
    assert torch.autograd.gradcheck(Norm.apply, (x, weight, torch.zeros_like(weight, requires_grad=True)))


def test_opcheck_and_compile(device):
    dy, x, weight, residual_grad = inputs(2, 5, 40, torch.float32, device, strided=True)
    arguments = (dy, x, *statistics(x), weight, residual_grad)
    library.opcheck(torch.ops.mlpint.ln_backward_add, arguments)
    library.opcheck(torch.ops.mlpint.ln_backward_add, (*arguments[:-1], None))
    run = torch.compile(lambda *a: [2 * t for t in ln_backward_add(*a)], fullgraph=True, backend="aot_eager")
    for a, b in zip(run(*arguments), ln_backward_add(*arguments), strict=True):
        assert torch.equal(a, 2 * b)


def test_no_rows_give_zero_parameter_gradients(device, poisoned):
    dy, x, weight, residual_grad = inputs(2, 0, 8, torch.float32, device)
    empty = torch.empty(2, 0, device=device)
    dx, dweight, dbias = ln_backward_add(dy, x, empty, empty, weight, residual_grad)
    assert dx.shape == (2, 0, 8) and not dweight.any() and not dbias.any()


def test_errors(device):
    dy, x, weight, residual_grad = inputs(2, 5, 8, torch.float32, device)
    mean, rstd = statistics(x)
    for arguments, message in [
        ((dy[0], x[0], mean, rstd, weight, None), r"x has shape \(5, 8\), expected \[J, M, D\]"),
        ((dy[:, :4], x, mean, rstd, weight, None), r"dy has shape \(2, 4, 8\), expected \(2, 5, 8\)"),
        (
            (dy, x, mean.bfloat16(), rstd, weight, None),
            r"mean is \(2, 5\) of torch.bfloat16 .* expected .* torch.float32",
        ),
        ((dy, x, mean, rstd, weight[:1], None), r"weight has shape \(1, 8\), expected \(2, 8\)"),
        ((dy.mT.contiguous().mT, x, mean, rstd, weight, None), "dy's last dimension has stride 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            ln_backward_add(*arguments)
