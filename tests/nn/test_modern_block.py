"""Blocks of today's language models: as the transformers library's layers, and both halves of the backward as autograd.

On ranks: programs/block_stack.py.
"""

import pytest
import torch

import mlpint
import mlpint.nn as mnn

SWIGLU = {"normalization": "rms", "feed_forward": "silu gated", "biases": "none", "positions": "rotary", "kv_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA2 = {"head_dim": 8, "query_pre_attn_scalar": 12, "attn_logit_softcapping": None, "sliding_window": 4}
VARIANTS = {
    "llama": SWIGLU,
    "one key head, wide heads, their norms": SWIGLU
    | {"kv_heads": 1, "head_width": 6, "qk_norm": True, "biases": "qkv"},
    "gelu gated, all biases, dropout": {"feed_forward": "gelu gated", "normalization": "rms", "dropout": 0.2},
    "LayerNorm, rotary, attention dropout": {"positions": "rotary", "attention_dropout": 0.3, "gelu": "none"},
    "scaled positions": SWIGLU | {"rope_scaling": (8.0, 1.0, 4.0, 16.0), "rope_theta": 100.0, "attention": "full"},
    "no biases": {"biases": "none", "kv_heads": 2},
    "norms of what is added": SWIGLU | {"norm": "output", "qk_norm": "all", "dropout": 0.2},
    "norms on both sides, LayerNorm": {"norm": "sandwich", "score_scale": 0.3},
    "norms on both sides, in a window": SWIGLU | {"norm": "sandwich", "window": 2, "yarn": (4.0, 32.0, 1.0, 16.0, 1.1)},
    "a window both ways": {"window": 2, "attention": "full", "attention_dropout": 0.3},
    "a window, GPT-2's block": {"window": 3, "norm": "post"},
}


def disturbed(module):
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module


@pytest.mark.parametrize("h", [1.0, 0.3])
@pytest.mark.parametrize("lengths", [None, (5, 3)])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_both_halves_of_the_backward_are_autograds(variant, lengths, h):
    block = disturbed(mnn.Block(16, 4, ffn=20, step_size=h, **variant).double())
    x, grad = (torch.randn(2, 5, 16, dtype=torch.float64) for _ in range(2))
    lengths = None if lengths is None else torch.tensor(lengths)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = block(leaf, lengths)
    y.backward(grad)
    torch.manual_seed(3)
    found, tape = block.split_forward(x, lengths)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found, y.detach(), **close)
    torch.testing.assert_close(tape.input_vjp(grad), leaf.grad, **close)
    for (name, p), gradient in zip(block.named_parameters(), tape.weight_vjp(), strict=True):
        torch.testing.assert_close(gradient, p.grad, **close, msg=lambda m, n=name: f"{n}: {m}")


def test_norms_of_heads_alone_are_trained():
    """Autograd is wanted for what goes into attention, though for nothing before it."""
    block = disturbed(mnn.Block(16, 4, qk_norm=True, **SWIGLU).double()).requires_grad_(False)
    block.q_norm.requires_grad_(True)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    block(x).square().sum().backward()
    y, tape = block.split_forward(x)
    tape.input_vjp(2 * y)
    (gradient,) = [g for g in tape.weight_vjp() if g is not None]
    torch.testing.assert_close(gradient, block.q_norm.weight.grad, rtol=1e-10, atol=1e-10)


MODELS = [
    ("Llama", {}),
    ("Llama", {"rope_parameters": LLAMA3}),
    ("Llama", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 4}),
    ("Llama", {"rope_parameters": YARN}),
    ("Mistral", {"sliding_window": None}),
    ("Mistral", {"sliding_window": 4}),
    ("Qwen2", {}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("Qwen3", {"head_dim": 8}),
    ("Olmo2", {}),
    ("Gemma", {"head_dim": 8}),
    ("Gemma2", GEMMA2),
]


def model_of(kind, **changed):
    transformers = pytest.importorskip("transformers")
    size = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 24}
    size |= {"intermediate_size": 40, "vocab_size": 11, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kind}Config")(**size | changed)
    model = disturbed(getattr(transformers, f"{kind}Model")(config)).eval()
    model.norm = torch.nn.Identity()
    return model


@pytest.mark.parametrize(("kind", "changed"), MODELS)
def test_as_the_library_computes_them(kind, changed):
    """Outputs and gradients, to the single precision in which the library has norms and positions."""
    if "rope_parameters" in changed and not hasattr(model_of(kind).config, "rope_parameters"):
        scaling = {k: v for k, v in changed["rope_parameters"].items() if k != "rope_theta"}
        changed = {"rope_scaling": scaling, "rope_theta": 100.0}
    model = model_of(kind, **changed)
    stack, x = mnn.from_transformers(model), torch.randn(2, 9, 24)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, z = stack(ours), model(inputs_embeds=theirs).last_hidden_state
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    for out in (y, z):
        out.square().mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    back = model_of(kind, **changed)
    mnn.to_transformers(stack, back)
    moved = dict(back.layers.named_parameters())
    assert len(moved) >= 27
    for name, p in moved.items():
        exact = {"rtol": 0, "atol": 1e-6 if kind.startswith("Gemma") else 0}
        torch.testing.assert_close(p, model.layers.get_parameter(name), **exact)
    with torch.no_grad():
        for name, stacked in stack.named_parameters():  # of Gemma's norms the library has what they differ from 1 by
            stacked.copy_(stacked.grad + (kind.startswith("Gemma") and name.startswith("ln")))
    mnn.to_transformers(stack, back)  # now gradients
    for name, p in model.layers.named_parameters():
        torch.testing.assert_close(moved[name], p.grad, rtol=2e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("kind", "changed", "text"),
    [
        ("Llama", {"hidden_act": "relu"}, "the model's activation is 'relu'"),
        ("Llama", {"attention_bias": True}, "attention_bias = True"),
        ("Llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("Gemma2", {"head_dim": 8}, "attn_logit_softcapping = 50.0: blocks do not cap scores"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type = 'linear'",
        ),
    ],
)
def test_models_that_are_refused(kind, changed, text):
    with pytest.raises(ValueError, match=text):
        mnn.from_transformers(model_of(kind, **changed))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kv_heads": 3}, "kv_heads = 3: must divide heads = 4"),
        ({"normalization": "batch"}, "normalization = 'batch': must be 'layer' or 'rms'"),
        ({"feed_forward": "selu"}, "feed_forward = 'selu': must be 'gelu' or 'relu' or 'silu gated' or 'gelu gated'"),
        ({"positions": "rotary", "head_width": 5}, "the 5 channels of a head must be an even number"),
        ({"normalization": "rms", "norm": "post"}, "norm = 'post': is for blocks with LayerNorms"),
        ({"window": -1}, "window = -1: must be a number of tokens"),
        ({"window": (4, 0)}, r"window = \(4, 0\): one block has one window"),
        ({"qk_norm": "some"}, "qk_norm = 'some': must be False or True or 'all'"),
        ({"score_scale": 0.0}, "score_scale = 0.0: must be positive"),
        ({"rope_scaling": (8.0, 1.0, 4.0, 16.0), "yarn": (4.0, 32.0, 1.0, 16.0, 1.1)}, "give one of them"),
        ({"rope_theta": 0.0}, "rope_theta = 0.0: must be positive"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        mnn.Block(16, 4, **settings)


def test_a_stacks_windows_are_checked():
    assert mnn.BlockStack(3, 8, 2, window=[4, 0]).settings.window == (4, 0)
    for window in ((), (2, -1), (2, True)):
        with pytest.raises(ValueError, match="must be a number of tokens, or 0 for all of them"):
            mnn.BlockStack(3, 8, 2, window=window)


def test_multilevel_training_takes_them():
    stack = mnn.BlockStack(4, 16, 4, **SWIGLU)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-2)
    multilevel = mlpint.Multilevel(stack, optimizer, coarse_steps=2, cycles=1)
    names = []
    for phase in multilevel.schedule(2):
        with phase:
            stack(torch.ones(1, 3, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        names.append(phase.name)
    assert set(names) == {"fine", "A", "B"}
