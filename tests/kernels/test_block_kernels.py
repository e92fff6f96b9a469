"""A stack whose operations are the kernels, against the same in plain PyTorch."""

import pytest
import torch

from mlpint import MGRIT, LayerParallel
from mlpint.kernels.dispatch import Choice, forced
from mlpint.nn import BlockStack
from mlpint.nn.attending import Attending, Padding
from mlpint.nn.attention import attention_backward, attention_train

OPERATIONS = ("ln_linear", "linear_axpy", "mlp", "attention", "attention_backward", "ln_backward_add")
KERNELS = {op: Choice("triton", None, "forced") for op in OPERATIONS}


@pytest.mark.parametrize("kernel", ["attention", "attention_backward"])
@pytest.mark.parametrize("padded", [False, True])
def test_kernels_and_torch_go_on_with_each_others_sums(device, kernel, padded):
    """One direction of attention by its kernel, the other by torch."""
    padding = Padding(torch.tensor([20, 13], device=device), 20) if padded else None
    to = Attending(2, 2, not padded, 0.3, padding)
    qkv, grad = torch.randn(3, 40, 96, device=device), torch.randn(3, 40, 32, device=device)
    found = []
    for op in (None, kernel):
        with forced({} if op is None else {op: Choice("triton", None, "forced")}):
            o, lse = attention_train(qkv, to)
            found.append((o, attention_backward(grad, qkv, o, lse, to)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("attention", "padded", "h"), [("causal", False, 1.0), ("full", True, 0.5)])
def test_a_stack_of_kernels(device, attention, padded, h, monkeypatch):
    """Batched and one by one, forward only and with its backward, from strided views of the parameters."""
    from mlpint.kernels import attention as attention_module
    from mlpint.kernels import attention_backward as backward_module
    from mlpint.kernels import linear_axpy, ln_backward, ln_linear, mlp

    taken = set()
    modules = (ln_linear, "ln_linear"), (ln_linear, "ln_linear_train"), (linear_axpy, "linear_axpy"), (mlp, "mlp")
    modules += (attention_module, "attention"), (attention_module, "attention_train")
    modules += (backward_module, "attention_backward_packed"), (ln_backward, "ln_backward_add")

    def noted(name, original):
        return lambda *args: (taken.add(name), original(*args))[1]

    for module, name in modules:
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))

    torch.manual_seed(0)
    stack = BlockStack(6, 32, 2, ffn=48, attention=attention).to(device)
    for p in stack.parameters():
        torch.nn.init.normal_(p, std=0.15)
    x = torch.randn(2, 10, 32, device=device)
    lengths = torch.tensor([10, 7], device=device) if padded else None
    results = []
    for choices in ({}, KERNELS):
        network = LayerParallel(stack, MGRIT(cfactor=2, forward_iters=2, backward_iters=1), step_size=h)
        leaf = x.clone().requires_grad_()
        with forced(choices):
            y = network(leaf, lengths=lengths)
            y.square().sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad for p in network.stacked.parameters())))
        assert taken == (set() if not choices else {name for _, name in modules}), taken
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["pre", "modern", "memory"])
def test_dropout_by_kernels(device, kind, monkeypatch):
    """The plain loop that autograd follows, and the solver's way, forward again and both halves of the backward: one
    mask, whether kernels thin the weights of attention or what they attend to is spelt out."""
    from mlpint.kernels import attention as attention_module
    from mlpint.kernels import dropout

    taken = set()
    for module, name in ((dropout, "drop"), (dropout, "drop_step"), (attention_module, "attention_train")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=original: (taken.add(n), f(*a))[1])
    settings = {"pre": {}, "modern": MODERN | {"feed_forward": "silu gated", "norm": "sandwich"}, "memory": {}}[kind]
    torch.manual_seed(0)
    stack = BlockStack(4, 32, 2, dropout=0.3, cross=kind == "memory", **settings).to(device)
    for p in stack.parameters():
        torch.nn.init.normal_(p, std=0.15)
    x = torch.randn(2, 10, 32, device=device)
    more = {"lengths": torch.tensor([10, 7], device=device)}
    if kind == "memory":
        more |= {"memory": torch.randn(2, 6, 32, device=device)}
    results = []
    for options in (MGRIT(levels=1), MGRIT(cfactor=2, forward_iters=2, backward_iters=2)):
        network = LayerParallel(stack, options)
        network.layer_random.seed = 3
        network.dropout_key(2, 1)
        leaf = x.clone().requires_grad_()
        with forced({"dropout": Choice("triton", None, "forced")}):
            y = network(leaf, **more)
            y.square().sum().backward()
        assert taken == (set() if options.exact else {"drop", "drop_step", "attention_train"}), taken
        results.append((y.detach(), leaf.grad, *(p.grad for p in network.stacked.parameters())))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    without = LayerParallel(stack, MGRIT(levels=1))
    without.layer_random.seed = 3
    without.dropout_key(2, 1)
    assert not torch.allclose(without(x, **more), results[0][0], rtol=1e-3), "torch's generators made the masks"


MODERN = {"normalization": "rms", "biases": "none", "positions": "rotary", "ffn": 48}
VARIANTS = {
    "qwen3": MODERN | {"feed_forward": "silu gated", "qk_norm": True, "biases": "qkv", "kv_heads": 1},
    "olmo2": MODERN | {"feed_forward": "gelu gated", "qk_norm": "all", "norm": "output", "kv_heads": 2},
    "gemma2": MODERN | {"feed_forward": "gelu gated", "norm": "sandwich", "kv_heads": 1, "score_scale": 0.3},
}
TODAYS = OPERATIONS + ("gated_linear", "gated_backward", "pack_heads")


@pytest.mark.parametrize("variant", VARIANTS)
def test_stacks_of_todays_blocks(device, variant, monkeypatch):
    from mlpint.kernels import gated_backward, gated_linear, ln_linear, pack_heads

    taken = set()
    names = {gated_linear: "gated_linear gated_linear_train", gated_backward: "gated_backward"}
    names |= {pack_heads: "pack_heads pack_heads_backward", ln_linear: "ln_linear ln_linear_train"}
    for module, functions in names.items():
        for name in functions.split():
            original = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, n=name, f=original: (taken.add(n), f(*args))[1])
    torch.manual_seed(0)
    stack = BlockStack(4, 32, 2, **VARIANTS[variant]).to(device)
    for p in stack.parameters():
        torch.nn.init.normal_(p, std=0.15)
    x, results = torch.randn(2, 6, 32, device=device), []
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [*range(6)]], device=device)
    angles = positions[..., None] * torch.rand(8, device=device)
    for choices in ({}, {op: Choice("triton", None, "forced") for op in TODAYS}):
        network, leaf = LayerParallel(stack, MGRIT(2, 2, 2, 1)), x.clone().requires_grad_()
        with forced(choices):
            y = network(leaf)
            z = network(leaf, rotation=(angles.cos(), angles.sin()))
            (y.square().sum() + z.pow(3).sum()).backward()
        results.append((y.detach(), z.detach(), leaf.grad, *(p.grad for p in network.stacked.parameters())))
    expected = {"gated_backward"}  # all that OLMo 2's leave: it has no norm before, and one over all heads
    if variant != "olmo2":
        expected |= {name for functions in names.values() for name in functions.split()}
    assert taken == expected, taken
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    with forced({op: Choice("triton", None, "forced") for op in TODAYS}), torch.autocast(x.device.type, torch.bfloat16):
        y = network(x)  # a kernel whose operands differ in dtype is not taken
        y.sum().backward()
    torch.testing.assert_close(y, results[0][0], rtol=0.1, atol=0.1)
