"""mlpint.nn.Block: against its formulas, its two-part backward against autograd, dropout keys, pretrained weights."""

import itertools

import pytest
import torch

import block_reference
import mlpint
from mlpint import nn as mnn
from mlpint.nn import dropout
from mlpint.nn.dropout import Dropout

D, HEADS, FFN, BATCH, SEQUENCE = 12, 3, 20, 3, 5


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def spread(module):
    """Parameters of a size at which every term of a block counts."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def block(**settings):
    return spread(mnn.Block(D, HEADS, **{"ffn": FFN} | settings))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


VARIANTS = list(
    itertools.product(
        ("pre", "post"), ("causal", "full"), ("tanh", "none"), (1.0, 0.3), (None, torch.tensor([SEQUENCE, 2, 0]))
    )
)
VARIANTS += [("pre", "causal", "relu", 1.0, None), ("post", "full", "relu", 0.3, torch.tensor([SEQUENCE, 2, 0]))]


@pytest.mark.parametrize(("norm", "attention", "gelu", "h", "lengths"), VARIANTS)
def test_against_formulas(norm, attention, gelu, h, lengths):
    feed_forward = {"feed_forward": "relu"} if gelu == "relu" else {"gelu": gelu}
    b = block(norm=norm, attention=attention, step_size=h, **feed_forward)
    x, g = torch.randn(BATCH, SEQUENCE, D, requires_grad=True), torch.randn(BATCH, SEQUENCE, D)
    parameters = dict(b.named_parameters())
    expected = block_reference.step(
        parameters, x, heads=HEADS, attention=attention, norm=norm, gelu=gelu, h=h, lengths=lengths
    )
    wanted = torch.autograd.grad(expected, [x, *parameters.values()], g)
    y = b(x, lengths=lengths)
    close(y, expected)
    for got, want in zip(torch.autograd.grad(y, [x, *parameters.values()], g), wanted, strict=True):
        close(got, want)
    y, tape = b.split_forward(x, lengths)
    close(y, expected)
    tape.input_vjp(torch.randn_like(g))  # an earlier sweep
    for got, want in zip([tape.input_vjp(g), *tape.weight_vjp()], wanted, strict=True):
        close(got, want)


@pytest.mark.parametrize(("h", "lengths"), [(1.0, None), (0.3, torch.tensor([7, 2, 0]))])
def test_attention_to_a_memory_against_formulas(h, lengths):
    b = block(cross=True, step_size=h)
    x, memory = torch.randn(BATCH, SEQUENCE, D, requires_grad=True), torch.randn(BATCH, 7, D, requires_grad=True)
    g, parameters = torch.randn(BATCH, SEQUENCE, D), dict(b.named_parameters())
    wanted = [x, memory, *parameters.values()]
    expected = block_reference.step(parameters, x, heads=HEADS, h=h, memory=memory, memory_lengths=lengths)
    gradients = torch.autograd.grad(expected, wanted, g)
    y = b(x, memory=memory, memory_lengths=lengths)
    close(y, expected)
    for got, want in zip(torch.autograd.grad(y, wanted, g), gradients, strict=True):
        close(got, want)
    y, tape = b.split_forward(x, memory=memory, memory_lengths=lengths)
    close(y, expected)
    tape.input_vjp(torch.randn_like(g))  # an earlier sweep
    for got, want in zip([tape.input_vjp(g), *tape.weight_vjp()], [gradients[0], *gradients[2:]], strict=True):
        close(got, want)


@pytest.mark.parametrize(("settings", "call", "words"), [
    ({}, {"memory": torch.zeros(3, 4, D)}, "go with cross = True"),
    ({}, {"memory_lengths": torch.ones(3, dtype=torch.int64)}, "go with cross = True"),
    ({"cross": True}, {}, r"memory is missing: .* attend to one, \[3, S, 12\]"),
    ({"cross": True}, {"memory": torch.zeros(2, 4, D)}, r"memory is \(2, 4, 12\): must be \[3, S, 12\]"),
    ({"cross": True}, {"memory": torch.zeros(3, 4, D), "memory_lengths": torch.ones(2)}, "memory_lengths is "),
])  # fmt: skip
def test_a_memory_that_does_not_fit_is_refused(settings, call, words):
    with pytest.raises(ValueError, match=words):
        block(**settings)(torch.randn(BATCH, SEQUENCE, D), **call)
    for more in {"norm": "post"}, {"normalization": "rms"}, {"kv_heads": 1}:
        with pytest.raises(ValueError, match="cross = True: is for blocks with norm = 'pre'"):
            block(cross=True, **more)


@pytest.mark.parametrize("norm", ["pre", "post", "cross"])
def test_split_backward_under_dropout(norm):
    """The backward makes the forward's masks again."""
    b = block(**({"cross": True} if norm == "cross" else {"norm": norm}), dropout=0.4, attention_dropout=0.2)
    x, g = torch.randn(BATCH, SEQUENCE, D, requires_grad=True), torch.randn(BATCH, SEQUENCE, D)
    lengths, more = torch.tensor([5, 3, 1]), {}
    if norm == "cross":
        more = {"memory": torch.randn(BATCH, 4, D), "memory_lengths": torch.tensor([4, 0, 3])}
    torch.manual_seed(7)
    y = b(x, lengths, **more)
    wanted = torch.autograd.grad(y, [x, *b.parameters()], g)
    torch.manual_seed(7)
    z, tape = b.split_forward(x, lengths, **more)
    close(z, y)
    for got, want in zip([tape.input_vjp(g), *tape.weight_vjp()], wanted, strict=True):
        close(got, want)
    assert not torch.equal(b(x, lengths, **more), y), "another draw, the same mask"
    b.eval()
    assert torch.equal(b(x, lengths, **more), b(x, lengths, **more))


def test_only_parameters_that_require_gradients():
    b = block()
    b.qkv.requires_grad_(False)
    b.ln2.weight.requires_grad_(False)
    b.up.weight.requires_grad_(False)
    x = torch.randn(BATCH, SEQUENCE, D)
    own = [p for p in b.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(b(x).square().sum(), own)
    y, tape = b.split_forward(x)
    tape.input_vjp(2 * y)
    for got, want in zip(tape.weight_vjp(), wanted, strict=True):
        close(got, want)


def test_padding_is_not_seen():
    for attention in ("causal", "full"):
        b, x, lengths = block(attention=attention), torch.randn(2, SEQUENCE, D), torch.tensor([3, 0])
        other = x.clone()
        other[0, 3:], other[1] = 9.0, -9.0
        y, z = b(x, lengths), b(other, lengths)
        assert torch.equal(y[0, :3], z[0, :3]) and bool(z.isfinite().all())
        close(y[0, :3], b(x[:1, :3])[0])  # as if the padding were not there


def test_autocast_is_followed():
    torch.set_default_dtype(torch.float32)
    b, x = block().float(), torch.randn(BATCH, SEQUENCE, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = b(x)
        z, tape = b.split_forward(x)
    wanted = torch.autograd.grad(y, list(b.parameters()), torch.ones_like(y))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, y, rtol=0.02, atol=0.02)
    assert not torch.equal(z, b(x)), "autocast changed nothing"
    tape.input_vjp(torch.ones_like(y))
    for got, want in zip(tape.weight_vjp(), wanted, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 0.03 * want.norm() + 1e-3


def test_conformance():
    mlpint.testing.check_block(block(dropout=0.3), torch.randn(BATCH, SEQUENCE, D))
    mlpint.testing.check_block(block(norm="post"), torch.randn(BATCH, SEQUENCE, D), torch.tensor([5, 1, 4]))


def test_masks_do_not_depend_on_the_batching_and_leave_torchs_generator_alone():
    keys, p, cpu, double = (3, 2**63 - 1, 2**64 - 1), 0.3, torch.device("cpu"), torch.float64
    before = torch.get_rng_state()
    masks = Dropout(keys, dropout.FFN, p).factors((4, 50), double, cpu)
    assert torch.equal(torch.get_rng_state(), before)
    for key, mask in zip(keys, masks, strict=True):
        assert torch.equal(Dropout((key,), dropout.FFN, p).factors((4, 50), double, cpu)[0], mask)
        assert torch.equal(Dropout((key,), dropout.FFN, p).factors((2, 50), double, cpu)[0], mask[:2])
    assert not torch.equal(masks[0], Dropout(keys[:1], dropout.PROJECTION, p).factors((4, 50), double, cpu)[0])
    assert len(masks.unique()) == 2 and masks.unique()[0] == 0
    many = Dropout(tuple(range(100)), dropout.FFN, p).factors((1000,), double, cpu) > 0
    many = many.double()
    assert masks.max() == pytest.approx(1 / (1 - p), rel=1e-4)
    assert abs(many.mean().item() - (1 - p)) < 4 * (p * (1 - p) / many.numel()) ** 0.5
    correlation = (many[:-1] - (1 - p)).mul(many[1:] - (1 - p)).mean().item() / (p * (1 - p))
    assert abs(correlation) < 4 / many[1:].numel() ** 0.5, "masks of neighbouring keys are alike"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"heads": 5}, "heads = 5: must divide dim = 12"),
        ({"attention": "banded"}, "attention = 'banded': must be 'causal' or 'full'"),
        ({"gelu": True}, "gelu = True"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
        ({"step_size": 0.0}, "step_size = 0.0: must be positive"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        mnn.Block(D, **{"heads": HEADS} | settings)


def test_bad_states():
    b = block()
    for call in (b, b.split_forward):
        with pytest.raises(ValueError, match=r"x is \(3, 5, 8\): a block of dim 12 takes"):
            call(torch.randn(3, 5, 8))
        with pytest.raises(ValueError, match="lengths is torch.int64 of shape"):
            call(torch.randn(3, 5, D), torch.tensor([3, 4]))
        with pytest.raises(ValueError, match="lengths is torch.bool"):
            call(torch.randn(3, 5, D), torch.ones(3, dtype=torch.bool))


# --- weights of transformers -----------------------------------------------------------------------------------------


def pretrained(kind, **changed):
    transformers = pytest.importorskip("transformers")
    size = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 24, "vocab_size": 11}
    if kind == "GPT2":
        size |= {"n_positions": SEQUENCE, "bos_token_id": 0, "eos_token_id": 0}
    else:
        size |= {"intermediate_size": 40}
    if kind == "ViT":
        size |= {"image_size": 8, "patch_size": 4}
    config = getattr(transformers, f"{kind}Config")(**size | changed)
    return spread(getattr(transformers, f"{kind}Model")(config)).eval()


def run_layers(model, x, lengths=None):
    """States before and after the model's layers."""
    if "GPT2" in type(model).__name__:
        model.ln_f = torch.nn.Identity()
        return x + model.wpe(torch.arange(x.shape[1])), model(inputs_embeds=x).last_hidden_state
    if "Bert" in type(model).__name__:
        mask = None if lengths is None else torch.arange(x.shape[1]) < lengths[:, None]
        return model.embeddings(inputs_embeds=x), model(inputs_embeds=x, attention_mask=mask).last_hidden_state
    model.layernorm, pixels = torch.nn.Identity(), torch.randn(2, 3, 8, 8)
    return model.embeddings(pixels), model(pixels).last_hidden_state


@pytest.mark.parametrize(("kind", "changed"), [("GPT2", {}), ("Bert", {}), ("ViT", {}), ("ViT", {"qkv_bias": False})])
def test_pretrained_weights(kind, changed):
    model = pretrained(kind, **changed)
    stack = mnn.from_transformers(model)
    before, after = run_layers(model, torch.randn(2, SEQUENCE, 24))
    close(stack(before), after)
    assert stack.qkv_bias.requires_grad == changed.get("qkv_bias", True)
    other = pretrained(kind, **changed)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    mnn.to_transformers(stack, other)
    name = {"GPT2": "h.", "Bert": "encoder.", "ViT": "layer"}[kind]
    moved = {n: p for n, p in other.named_parameters() if name in n and "layernorm." not in n}
    assert len(moved) >= 36 and all(torch.equal(p, model.get_parameter(n)) for n, p in moved.items())


def test_pretrained_weights_and_padding():
    model, lengths = pretrained("Bert"), torch.tensor([SEQUENCE, 3])
    before, after = run_layers(model, torch.randn(2, SEQUENCE, 24), lengths)
    y = mnn.from_transformers(model)(before, lengths)
    close(y[0], after[0])
    close(y[1, :3], after[1, :3])


@pytest.mark.parametrize(
    ("kind", "changed", "text"),
    [
        ("GPT2", {"activation_function": "tanh"}, "the model's activation is 'tanh'"),
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True: blocks compute"),
        ("T5", {"d_kv": 4}, "only these can be converted"),
    ],
)
def test_models_that_are_refused(kind, changed, text):
    with pytest.raises(ValueError, match=text):
        mnn.from_transformers(pretrained(kind, **changed))


def test_weights_do_not_go_into_another_model():
    stack = mnn.from_transformers(pretrained("ViT"))
    with pytest.raises(ValueError, match="the model has 3 layers"):
        mnn.to_transformers(stack, pretrained("Bert"))
    with pytest.raises(ValueError, match="make the model with qkv_bias=True"):
        mnn.to_transformers(stack, pretrained("ViT", qkv_bias=False))
