"""Norms of heads, rotary positions and grouped queries in one pass, against torch in float64 and autograd."""

import pytest
import torch
from torch import library

from kernel_checks import assert_as_good_as_torch, layered
from mlpint.kernels import pack_heads as module

OPERATION, BACKWARD = torch.ops.mlpint.pack_heads.default, torch.ops.mlpint.pack_heads_backward.default
# (J, M, H, K, hd), rows of the tables
SHAPES = [((2, 9, 4, 2, 10), 3), ((1, 1, 1, 1, 2), 1), ((2, 16, 3, 1, 16), 16)]


def inputs(shape, rows, dtype, device, norm=True, rotary=True):
    layers, m, heads, kv_heads, width = shape
    qkv = torch.randn(layers, m, (heads + 2 * kv_heads) * width, device=device).to(dtype)
    weights = [layered(layers, width, dtype=dtype, device=device) if norm else None for _ in range(2)]
    angles = torch.randn(rows, width // 2, device=device)
    tables = [angles.cos().to(dtype), angles.sin().to(dtype)] if rotary else [None, None]
    return qkv, heads, kv_heads, *weights, *tables


def wide(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rows"), SHAPES)
@pytest.mark.parametrize(("norm", "rotary"), [(False, True), (True, True), (False, False)])
def test_matches_float64(device, poisoned, shape, rows, norm, rotary, dtype, monkeypatch):
    monkeypatch.setattr(module, "default_config", lambda *_: {"BLOCK_M": 8, "num_warps": 4})
    arguments = inputs(shape, rows, dtype, device, norm, rotary)
    results = OPERATION(*arguments)
    in_torch, exact = module.pack_heads_reference(*arguments), module.pack_heads_reference(*wide(arguments))
    assert_as_good_as_torch(results[0], in_torch[0], exact[0])
    for rms, true in zip(results[1:], exact[1:], strict=True):
        assert rms.dtype == torch.float32
        torch.testing.assert_close(rms.double(), true, rtol=1e-5, atol=1e-6)
    heads, tables = arguments[1:3], arguments[5:]
    grad = torch.randn(*results[0].shape, device=device).to(dtype)
    in_torch = module.pack_heads_backward_reference(grad, *heads, *tables)
    exact = module.pack_heads_backward_reference(grad.double(), *heads, *wide(tables))
    assert_as_good_as_torch(BACKWARD(grad, *heads, *tables), in_torch, exact)


def test_default_configurations_and_no_rows(device, poisoned):
    for width in (2, 64, 300):
        arguments = inputs((1, 70, 2, 1, width), 35, torch.float32, device)
        torch.testing.assert_close(OPERATION(*arguments), module.pack_heads_reference(*arguments), rtol=1e-5, atol=1e-5)
    empty = inputs((1, 0, 2, 1, 8), 4, torch.float32, device)
    assert OPERATION(*empty)[0].shape == (1, 0, 48)


def test_opcheck(device):
    for norm in (True, False):
        library.opcheck(OPERATION, inputs((2, 6, 4, 2, 8), 3, torch.float32, device, norm))
    library.opcheck(BACKWARD, (torch.randn(2, 6, 96, device=device), 4, 2, None, None))


def test_bad_arguments_say_what_is_wrong(device):
    qkv, heads, kv_heads, q, k, cos, sin = inputs((2, 6, 4, 2, 8), 3, torch.float32, device)
    for call, message in [
        (lambda: OPERATION(qkv, 4, 3, q, k, cos, sin), r"expected \[J, M, 10 hd\] contiguous"),
        (lambda: OPERATION(qkv, 4, 2, q, None, cos, sin), "q_weight and k_weight come together"),
        (lambda: OPERATION(qkv, 4, 2, q[:1], k, cos, sin), r"q_weight has shape \(1, 8\), expected \(2, 8\)"),
        (lambda: OPERATION(qkv, 4, 2, q, k, cos, None), "cos and sin come together"),
        (lambda: OPERATION(qkv, 4, 2, q, k, cos.repeat(2, 1)[:4], sin), r"cos has shape \(4, 4\).*R a divisor of M"),
        (lambda: OPERATION(qkv, 4, 2, q, k, cos.half(), sin), "cos is torch.float16"),
        (lambda: OPERATION(qkv.mT.contiguous().mT, 4, 2, q, k, cos, sin), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
