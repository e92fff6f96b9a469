"""Who attends to whom: masks and rotations that are given, against lengths, windows and autograd; torch's fused ops."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mlpint.nn as mnn
from mlpint import MGRIT, LayerParallel, PerLayer
from mlpint.nn import fused_attention
from mlpint.nn.attending import Attending, GivenMasks, Padding
from mlpint.nn.attention import attention, attention_backward, attention_train
from mlpint.nn.cross_attention import Remembering, cross_attention, cross_attention_backward, cross_attention_train
from mlpint.nn.heads import rotary_tables

ROTARY = {"positions": "rotary", "normalization": "rms", "biases": "none", "kv_heads": 1}
PAIRS = {"pre": {}, "post": {"norm": "post"}, "rotary": ROTARY, "dropout": {"attention_dropout": 0.3, "norm": "post"}}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def seen(lengths, sequence=6, causal=False):
    """[B, 1, T, T]: by lengths, padded queries see none."""
    inside = torch.arange(sequence) < torch.tensor(lengths)[:, None]
    mask = inside[:, None, :] & inside[:, :, None]
    return (mask & torch.ones(sequence, sequence, dtype=torch.bool).tril() if causal else mask)[:, None]


def results(block, x, *args, **kwargs):
    """Output, gradients by autograd, and the same by both halves of the backward."""
    leaf, found = x.clone().requires_grad_(), []
    torch.manual_seed(5)
    y = block(leaf, *args, **kwargs)
    found.append([y, *torch.autograd.grad(y.pow(3).sum(), [leaf, *block.parameters()])])
    torch.manual_seed(5)
    y, tape = block.split_forward(x, *args, **kwargs)
    found.append([y, tape.input_vjp(3 * y.square()), *tape.weight_vjp()])
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    return found[0]


@pytest.mark.parametrize("variant", PAIRS)
@pytest.mark.parametrize("attention", ["causal", "full"])
def test_a_mask_says_what_lengths_say(variant, attention):
    block = mnn.Block(8, 2, attention=attention, **PAIRS[variant])
    x, lengths = torch.randn(3, 6, 8), (6, 4, 0)
    expected = results(block, x, torch.tensor(lengths))
    mask = seen(lengths, causal=attention == "causal")
    assert not mask[2].any()
    torch.testing.assert_close(results(block, x, attention_mask=mask), expected, **CLOSE)
    for numbers in (
        torch.zeros(mask.shape).masked_fill(~mask, -1e30),
        torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
    ):
        found = results(block, x, attention_mask=numbers)
        assert all(bool(t.isfinite().all()) for t in found)
        torch.testing.assert_close(found[0][0], expected[0][0], **CLOSE)  # a row in which every token sees one


def test_a_mask_stands_for_causality_and_windows():
    x = torch.randn(2, 6, 8)
    windowed, plain = (mnn.Block(8, 2, attention=a, window=w) for a, w in (("causal", 3), ("full", 0)))
    plain.load_state_dict(windowed.state_dict())
    back = torch.arange(6)[:, None] - torch.arange(6)
    mask = ((back >= 0) & (back < 3))[None, None]
    torch.testing.assert_close(results(plain, x, attention_mask=mask), results(windowed, x), **CLOSE)
    keys = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])[:, None, None]
    assert torch.equal(plain(x, attention_mask=keys)[1, :3], plain(x[1:, :3])[0])


def test_positions_that_start_anew():
    """Two texts in one row, by a mask and a rotation, are the texts on their own."""
    block = mnn.Block(8, 2, **ROTARY)
    cos, sin = (
        table[None, [0, 1, 2, 3, 0, 1], 0]
        for table in rotary_tables(block.settings, 6, torch.device("cpu"), torch.float64)
    )
    apart = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool().tril()[None, None]
    x = torch.randn(2, 6, 8)
    y = results(block, x, attention_mask=apart, rotation=(cos, sin))[0]
    torch.testing.assert_close(y, torch.cat([block(x[:, :4]), block(x[:, 4:])], 1), **CLOSE)


def test_masks_by_layer_on_a_stack():
    """Several layers in one step, some with masks of their own and some without, as the blocks one by one."""
    stack = mnn.BlockStack(8, 8, 2, window=(2, 0, 0), **ROTARY)
    x, some = torch.randn(2, 6, 8), seen((6, 4), causal=True)
    masks = PerLayer([some if n % 4 == 1 else None for n in range(8)])
    found = []
    for layers in (stack.to_blocks(), stack):
        network, leaf = (
            LayerParallel(layers, MGRIT(cfactor=2, forward_iters=2, backward_iters=2)),
            x.clone().requires_grad_(),
        )
        y = network(leaf, attention_mask=masks)
        found.append([y, *torch.autograd.grad(y.pow(3).sum(), [leaf])])
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    y = x
    for n, block in enumerate(stack.to_blocks()):
        y = block(y, attention_mask=masks.values[n])
    torch.testing.assert_close(LayerParallel(stack, MGRIT(levels=1))(x, attention_mask=masks), y, **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"attention_mask": torch.ones(2, 1, 5, 6, dtype=torch.bool)},
            r"attention_mask is \(2, 1, 5, 6\): must be \[2",
        ),
        ({"attention_mask": torch.ones(1, 2, 6, 6)}, "alike for all heads"),
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.int64)}, "attention_mask is torch.int64"),
        ({"attention_mask": seen((6, 6)), "lengths": torch.tensor([6, 6])}, "give one of them"),
        ({"rotation": (torch.ones(1, 6, 2),) * 2}, "rotation goes with positions = 'rotary'"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        mnn.Block(8, 2)(torch.zeros(2, 6, 8), **arguments)
    with pytest.raises(ValueError, match=r"rotation is \(3, 6, 2\)"):
        mnn.Block(8, 2, **ROTARY)(torch.zeros(2, 6, 8), rotation=(torch.ones(3, 6, 2),) * 2)


@pytest.mark.parametrize("operation", [fused_attention._Flash(), fused_attention._Efficient()])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [20, 13])
def test_gpu_operations_by_their_shapes(operation, masked, keys):
    """Without a GPU: torch takes the arguments, and what comes back has the shapes that attention relies on."""
    if masked and isinstance(operation, fused_attention._Flash):
        return  # which takes no mask, and is not chosen with one
    with FakeTensorMode(), torch.no_grad():
        q, grad = (torch.empty(4, 2, 20, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(4, 2, keys, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        bias = torch.empty(4, 1, 1, keys, dtype=torch.bfloat16, device="cuda") if masked else None
        causal = not masked and keys == 20
        o, lse = operation.forward(q, k, v, bias, causal, 0.3)
        assert o.shape == q.shape and lse.shape[:2] == (4, 2) and lse.shape[2] >= 20
        sums = lse.narrow(-1, 0, 20)  # as a kernel gives them
        gradients = operation.backward(grad, q, k, v, o, sums, bias, causal, 0.3)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_which_operation_is_chosen(monkeypatch):
    class Operand:
        device, shape = torch.device("cuda"), (4, 2, 20, 16)

        def element_size(self):
            return 2

    q = Operand()
    flash, efficient = [True], [True]
    monkeypatch.setattr(fused_attention.cuda, "SDPAParams", lambda *operands: operands)
    monkeypatch.setattr(fused_attention.cuda, "can_use_flash_attention", lambda operands: flash[0])
    monkeypatch.setattr(fused_attention.cuda, "can_use_efficient_attention", lambda operands: efficient[0])
    assert isinstance(fused_attention.chosen(q, q, q, None, True), fused_attention._Flash)
    assert isinstance(fused_attention.chosen(q, q, q, q, False), fused_attention._Efficient)
    flash[0] = False
    assert isinstance(fused_attention.chosen(q, q, q, None, True), fused_attention._Efficient)
    efficient[0] = False
    assert fused_attention.chosen(q, q, q, None, True) is None
    flash[0], q.shape = True, (4, 2, 20, 12)
    assert fused_attention.chosen(q, q, q, None, True) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["causal", "full", "padded", "windows", "masks"])
def test_backward_on_a_gpu(kind, dtype):
    """With the saved log-sum-exp, against autograd in double precision."""
    j, batch, sequence, heads, width = 3, 2, 20, 2, 16
    padding = Padding(torch.tensor([20, 13], device="cuda"), sequence) if kind == "padded" else None
    given = GivenMasks([seen((20, 13), sequence, True).cuda()] * j, batch, sequence) if kind == "masks" else None
    windows = (3, 20, 7) if kind == "windows" else None
    to = Attending(batch, heads, kind in ("causal", "windows"), 0.3, padding, windows, given)
    shape = j, batch * sequence, 3 * heads * width
    qkv, grad = (torch.randn(j, batch * sequence, w, device="cuda").to(dtype) for w in (shape[2], shape[2] // 3))
    o, lse = attention_train(qkv, to)
    assert lse.numel()
    found = attention_backward(grad, qkv, o, lse, to)
    leaf = qkv.double().requires_grad_()
    exact = attention(leaf, to)
    exact.backward(grad.double())
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(o.double(), exact.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.double(), leaf.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_to_a_memory_on_a_gpu(padded, dtype):
    lengths = torch.tensor([13, 0], device="cuda") if padded else None
    to = Remembering(2, 2, 0.3, None if lengths is None else Padding(lengths, 13))
    q, grad = (torch.randn(3, 40, 32, device="cuda").to(dtype) for _ in range(2))
    kv = torch.randn(3, 26, 64, device="cuda").to(dtype)
    o, lse = cross_attention_train(q, kv, to)
    assert lse.numel()
    leaves = [t.double().requires_grad_() for t in (q, kv)]
    wanted = cross_attention(*leaves, to)
    wanted.backward(grad.double())
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    found = cross_attention_backward(grad, q, kv, o, lse, to)
    for got, want in zip((o, *found), (wanted.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
