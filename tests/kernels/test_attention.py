"""Attention and its backward, against plain attention and autograd in float64."""

import pytest
import torch
from torch import library

from mlpint.kernels import attention as forward
from mlpint.kernels import attention_backward as backward
from mlpint.kernels.attention import attention, attention_backward, attention_reference, attention_train
from mlpint.kernels.attention_backward import attention_backward_packed, attention_backward_reference
from mlpint.kernels.dropout import mask_reference

LENGTHS = {"full": None, "shared": [0, 37, 20], "each": [[1, 16, 17], [37, 0, 5]]}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks each way in short sequences, of different sizes."""
    monkeypatch.setattr(forward, "default_config", lambda *_: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4})
    monkeypatch.setattr(backward, "default_config", lambda *_: {"BLOCK_OWN": 16, "BLOCK_OTHER": 32, "num_warps": 4})


def heads(j, b, h, t, d, dtype, device):
    """(q, k, v, do), [j, b, h, t, d]: views of what a QKV projection gives, and a gradient with gaps."""
    qkv = torch.randn(j, b, t, 3, h, d, device=device).to(dtype)
    do = torch.randn(2 * j, b, t, 2, h, d, device=device).to(dtype)[::2, :, :, 1]
    return *qkv.transpose(2, 4).unbind(3), do.transpose(2, 3)


def lengths_of(name, device):
    return None if LENGTHS[name] is None else torch.tensor(LENGTHS[name], dtype=torch.int32, device=device)


def expected(q, k, v, do, causal, lengths, scale):
    """(o, dq, dk, dv) one sequence at a time, cut to its length, by autograd in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    o = torch.zeros_like(q)
    lengths = [[q.shape[3]] * q.shape[1]] * len(q) if lengths is None else lengths.expand(q.shape[:2]).tolist()
    for i, row in enumerate(lengths):
        for s, n in enumerate(row):
            scores = scale * q[i, s, :, :n] @ k[i, s, :, :n].mT
            if causal:
                scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool, device=q.device).tril(), -torch.inf)
            o[i, s, :, :n] = scores.softmax(-1) @ v[i, s, :, :n]
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do.double())


@pytest.mark.parametrize(("lengths", "causal"), [("full", True), ("each", False)])
def test_dropout(device, poisoned, lengths, causal):
    """Of the weights, by the mask of the dropout kernel's function, in all three kernels."""
    q, k, v, do = heads(2, 3, 2, 37, 24, torch.float32, device)
    lengths, scale = lengths_of(lengths, device), 0.3
    seeds, levels = torch.tensor([3, -5], device=device), 20000
    given = causal, lengths, scale, seeds, 3, levels
    factors = mask_reference(seeds, 3, 3 * 2 * 37, 37, levels).view(2, 3, 2, 37, 37).to(device)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted, _ = attention_reference(*leaves, causal, lengths, scale, factors)
    o, lse = attention_train(q, k, v, *given)
    gradients = attention_backward(do, q, k, v, o, lse, *given)
    for a, b in zip((o, *gradients), (wanted, *torch.autograd.grad(wanted, leaves, do.double())), strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=3e-5, atol=3e-5)
    assert torch.equal(o, attention(q, k, v, *given))
    assert not torch.allclose(o, attention(q, k, v, causal, lengths, scale))
    packed = attention_backward_packed(do, q, k, v, o, lse, *given)
    assert all(torch.equal(a, b) for a, b in zip(packed.transpose(2, 4).unbind(3), gradients, strict=True))
    reference = attention_backward_reference(do, q, k, v, o, lse, causal, lengths, scale, factors)
    for a, b in zip(gradients, reference, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=3e-5, atol=3e-5)
    for bad, words in (((seeds[:1], 3, 5), "expected int64"), ((None, 0, 5), "levels = 5 without seeds")):
        with pytest.raises(ValueError, match=words):
            attention(q, k, v, causal, lengths, scale, *bad)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_forward_and_backward(device, poisoned, causal, lengths):
    q, k, v, do = heads(2, 3, 2, 37, 24, torch.float32, device)
    lengths, scale = lengths_of(lengths, device), 0.3
    o, lse = attention_train(q, k, v, causal, lengths, scale)
    grads = attention_backward(do, q, k, v, o, lse, causal, lengths, scale)
    for a, b in zip((o, *grads), expected(q, k, v, do, causal, lengths, scale), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, attention_reference(q, k, v, causal, lengths, scale)[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(o, attention(q, k, v, causal, lengths, scale))
    packed = attention_backward_packed(do, q, k, v, o, lse, causal, lengths, scale)
    assert all(torch.equal(a, b) for a, b in zip(packed.transpose(2, 4).unbind(3), grads, strict=True))
    reference = attention_backward_reference(do, q, k, v, o, lse, causal, lengths, scale)
    for a, b in zip(grads, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("t, head", [(1, 16), (3, 5), (64, 128), (65, 80)])
def test_shapes(device, poisoned, t, head):
    q, k, v, do = heads(1, 1, 2, t, head, torch.float32, device)
    o, lse = attention_train(q, k, v, True, None, 0.1)
    grads = attention_backward(do, q, k, v, o, lse, True, None, 0.1)
    for a, b in zip((o, *grads), expected(q, k, v, do, True, None, 0.1), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal, lengths", [(True, "full"), (False, "each")])
def test_narrow_types_are_as_good_as_torch(device, poisoned, dtype, causal, lengths):
    q, k, v, do = heads(2, 3, 1, 37, 24, dtype, device)
    lengths = lengths_of(lengths, device)
    results = attention_train(q, k, v, causal, lengths, 0.2)
    results = (results[0], *attention_backward(do, q, k, v, *results, causal, lengths, 0.2))
    plain = attention_reference(q, k, v, causal, lengths, 0.2)
    plain = (plain[0], *attention_backward_reference(do, q, k, v, *plain, causal, lengths, 0.2))
    for a, by_torch, b in zip(results, plain, expected(q, k, v, do, causal, lengths, 0.2), strict=True):
        assert a.dtype == dtype
        limit = 2 * (by_torch.double() - b).abs().max() + 1e-5
        assert (a.double() - b).abs().max() <= limit


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_never_read_and_large_scores_do_not_overflow(device, poisoned, causal):
    q, k, v, do = heads(1, 3, 1, 37, 16, torch.float32, device)
    q, k = 30 * q.abs(), -30 * k.abs()  # log-sum-exps far below what 2^-x can hold
    lengths = lengths_of("shared", device)
    for x in (q, k, v, do):
        for s, n in enumerate(LENGTHS["shared"]):
            x[:, s, :, n:] = float("nan")
    o, lse = attention_train(q, k, v, causal, lengths, 0.25)
    grads = attention_backward(do, q, k, v, o, lse, causal, lengths, 0.25)
    assert lse.min() < -200 and lse.isfinite().all()
    q, k, v, do = (x.nan_to_num(0.0) for x in (q, k, v, do))
    for a, b in zip((o, *grads), expected(q, k, v, do, causal, lengths, 0.25), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)
        for s, n in enumerate(LENGTHS["shared"]):
            assert not a[:, s, :, n:].any()


def test_lengths_beyond_the_sequence_count_as_its_ends(device):
    q, k, v, _ = heads(1, 2, 1, 20, 16, torch.float32, device)
    wild, tame = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([-3, 99], [0, 20]))
    assert torch.equal(attention(q, k, v, False, wild, 1.0), attention(q, k, v, False, tame, 1.0))


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, lengths):
        o, lse = attention_train(q, k, v, causal, lengths, 0.5)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal, ctx.lengths = causal, lengths
        return o

    @staticmethod
    def backward(ctx, do):
        return *attention_backward(do, *ctx.saved_tensors, ctx.causal, ctx.lengths, 0.5), None, None


@pytest.mark.parametrize("causal, lengths", [(True, None), (False, [2])])
def test_gradcheck(device, causal, lengths):
    q, k, v, _ = (x.double().requires_grad_() for x in heads(1, 1, 1, 3, 2, torch.float32, device))
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    assert torch.autograd.gradcheck(Attention.apply, (q, k, v, causal, lengths))


def test_opcheck_and_compile(device):
    q, k, v, do = heads(1, 2, 2, 5, 8, torch.float32, device)
    shape = (False, torch.tensor([5, 3], dtype=torch.int32, device=device), 0.5)
    o, lse = attention_train(q, k, v, *shape)
    library.opcheck(torch.ops.mlpint.attention, (q, k, v, *shape))
    library.opcheck(torch.ops.mlpint.attention_train, (q, k, v, True, None, 0.5))
    library.opcheck(torch.ops.mlpint.attention_backward, (do, q, k, v, o, lse, *shape))
    library.opcheck(torch.ops.mlpint.attention_backward_packed, (do, q, k, v, o, lse, *shape))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v, do):
        o, lse = attention_train(2 * q, k, v, *shape)
        return attention_backward(do, 2 * q, k, v, o, lse, *shape)[1].sum()

    o, lse = attention_train(2 * q, k, v, *shape)
    assert torch.equal(run(q, k, v, do), attention_backward(do, 2 * q, k, v, o, lse, *shape)[1].sum())


def test_errors(device):
    q, k, v, _ = heads(1, 2, 1, 5, 8, torch.float32, device)
    lengths = torch.tensor([5, 3], device=device)
    for arguments, message in [
        ((q[0], k, v, True, None, 1.0), r"q has shape \(2, 1, 5, 8\), expected \[J, B, H, T, head dimension"),
        ((q, k[:, :1], v, True, None, 1.0), r"k has shape \(1, 1, 1, 5, 8\), expected \(1, 2, 1, 5, 8\)"),
        ((q, k, v.double(), True, None, 1.0), "v is torch.float64"),
        ((q, k, v, True, lengths, 1.0), r"lengths is torch.int64 \[2\] .* expected int32 \[1, 2\] or \[2\]"),
        ((q, k, v, True, lengths[:1].int(), 1.0), r"lengths is torch.int32 \[1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(*arguments)


@pytest.mark.parametrize("configs", [forward.configs, backward.configs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_fit_short_sequences(configs, dtype):
    for tokens in (5, 64, 2000):
        candidates = configs(64, tokens, dtype)[1:]  # the first is the default, small blocks here
        assert candidates and len({tuple(c.items()) for c in candidates}) == len(candidates)
        if dtype == torch.bfloat16:
            assert all(c.get("BLOCK_M", c.get("BLOCK_OWN")) <= max(16, 2 * tokens - 1) for c in candidates)
