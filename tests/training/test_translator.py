"""The translator's layers against PyTorch's own, token by token against all at once, and in LayerParallel."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlpint import MGRIT, LayerParallel
from mlpint.nn import DecoderBlock, EncoderBlock, EncoderDecoder
from mlpint.nn.stack import named_rows
from mlpint.parallel.gather_model import gather_model
from mlpint.training.models import Shape
from mlpint.training.models.translation import Stepwise, Translator, sinusoids

DIM, HEADS, FFN, VOCABULARY = 12, 3, 20, 11
LENGTHS = torch.tensor([5, 2, 4])


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(layers=(2, 3), **options):
    model = Translator(VOCABULARY, Shape(sum(layers), DIM, HEADS, FFN, **options), layers[0])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def batch(sources=3, target=6):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(VOCABULARY, (sources, 5), generator=generator),
        LENGTHS[:sources],
        torch.randint(VOCABULARY, (sources, target), generator=generator),
    )


def gelu(x):
    return F.gelu(x, approximate="tanh")


def torch_attention(theirs, q, kv, proj):
    theirs.in_proj_weight, theirs.in_proj_bias = (nn.Parameter(torch.cat([q[i], kv[i]])) for i in range(2))
    theirs.out_proj.load_state_dict(proj.state_dict())


def torch_layer(layer):
    """PyTorch's pre-LN layer with the weights of one of ours."""
    kind = nn.TransformerEncoderLayer if isinstance(layer, EncoderBlock) else nn.TransformerDecoderLayer
    theirs = kind(DIM, HEADS, FFN, dropout=0.0, activation=gelu, batch_first=True, norm_first=True)
    qkv = layer.qkv
    torch_attention(
        theirs.self_attn, (qkv.weight[:DIM], qkv.bias[:DIM]), (qkv.weight[DIM:], qkv.bias[DIM:]), layer.proj
    )
    norms = [layer.ln1, layer.ln2]
    if isinstance(layer, DecoderBlock):
        q, kv = layer.cross_q, layer.cross_kv
        torch_attention(theirs.multihead_attn, (q.weight, q.bias), (kv.weight, kv.bias), layer.cross_proj)
        norms.insert(1, layer.ln_cross)
    for n, norm in enumerate(norms, 1):
        getattr(theirs, f"norm{n}").load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(layer.up.state_dict())
    theirs.linear2.load_state_dict(layer.down.state_dict())
    return theirs


def reference(model, source, lengths, target):
    """Logits by PyTorch's layers, one stream after the other."""
    x, y = (model.tokens(t) * DIM**0.5 + sinusoids(0, t.shape[1], DIM, t.device) for t in (source, target))
    padding = torch.arange(source.shape[1]) >= lengths[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
    for layer in model.blocks:
        theirs = torch_layer(layer)
        if isinstance(layer, EncoderBlock):
            x = theirs(x, src_key_padding_mask=padding)
        else:
            memory = layer.ln_memory(x)
            y = theirs(y, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding)
    return model.head(model.norm(y))


def test_layers_are_those_of_pytorch():
    model, inputs = make(), batch()
    torch.testing.assert_close(model(*inputs), reference(model, *inputs), rtol=1e-12, atol=1e-12)


def test_positions_are_those_of_the_paper():
    found = sinusoids(3, 2, 8, torch.device("cpu"))
    for row, place in enumerate((3, 4)):
        for i in range(4):
            angle = torch.tensor(place / 10000 ** (2 * i / 8))
            torch.testing.assert_close(found[row, i], angle.sin())
            torch.testing.assert_close(found[row, i + 4], angle.cos())


def test_each_layer_moves_its_own_stream():
    model, (source, _, target) = make(), batch()
    x, y = model.embed(source), model.embed(target)
    for layer in model.blocks:
        new_x, new_y = layer((x, y))
        moved = (new_x is not x, new_y is not y)
        assert moved == ((True, False) if isinstance(layer, EncoderBlock) else (False, True))


def test_padding_and_later_tokens_do_not_count():
    model, (source, lengths, target) = make(), batch()
    expected = model(source, lengths, target)
    padded = torch.where(torch.arange(5) >= lengths[:, None], (source + 1) % VOCABULARY, source)
    longer = F.pad(padded, (0, 3), value=7)
    torch.testing.assert_close(model(longer, lengths, target), expected)
    changed = target.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCABULARY
    found = model(source, lengths, changed)
    torch.testing.assert_close(found[:, :4], expected[:, :4])
    assert (found[:, 4:] - expected[:, 4:]).abs().amax((1, 2)).min() > 1e-3
    assert not torch.allclose(model(source, lengths + torch.tensor([0, 1, 0]), target)[1], expected[1])


@pytest.mark.parametrize("step_size", [1.0, 0.5])
def test_token_by_token_is_all_at_once(step_size):
    model, (source, lengths, target) = make().eval(), batch()
    blocks = LayerParallel(copy.deepcopy(model.blocks), MGRIT(levels=1), step_size=step_size, open_layers=1)
    parallel = copy.deepcopy(model)
    parallel.blocks = blocks
    expected = parallel(source, lengths, target)
    network, sizes = gather_model(parallel, lambda: Translator(VOCABULARY, Shape(5, DIM, HEADS, FFN), 2))
    assert sizes == [1.0] + 4 * [step_size] and not network.training
    decoder = Stepwise(network, source, lengths, sizes)
    decoder.expand(2)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    order = torch.tensor([1, 0, 3, 3, 4, 5])
    for t in range(target.shape[1]):
        found = decoder.logits(target[rows, t])
        torch.testing.assert_close(found, expected[rows, t], rtol=1e-10, atol=1e-10)
        decoder.select(order)


def test_chosen_targets_are_gone_on_with():
    """Targets of one source that differ, of which one is dropped on the way."""
    model, (source, lengths, _) = make().eval(), batch(sources=1)
    targets = torch.tensor([[1, 2, 3], [4, 5, 6]])
    decoder = Stepwise(model, source, lengths)
    decoder.expand(2)
    decoder.logits(targets[:, 0])
    decoder.logits(targets[:, 1])
    decoder.select(torch.tensor([1, 1]))
    found = decoder.logits(torch.tensor([6, 3]))
    for row, tokens in zip(found, ([4, 5, 6], [4, 5, 3]), strict=True):
        torch.testing.assert_close(row, model(source, lengths, torch.tensor([tokens]))[0, -1])


@pytest.mark.parametrize("options", [MGRIT(levels=1), MGRIT(cfactor=2, forward_iters=3, backward_iters=3)])
def test_one_stack_in_layer_parallel(options):
    model, (source, lengths, target) = make((3, 3), dropout=0.0), batch()
    parallel, stacked = (copy.deepcopy(model) for _ in range(2))
    parallel.blocks = LayerParallel(parallel.blocks, options)
    stacked.blocks = LayerParallel(EncoderDecoder.from_blocks(stacked.blocks), options)
    for each in model, parallel, stacked:
        F.cross_entropy(each(source, lengths, target).flatten(0, 1), target.flatten()).backward()
    rows = {name: part(p.grad) if part else p.grad for name, p, part in named_rows(stacked)}
    for (name, p), q in zip(model.named_parameters(), parallel.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-13, msg=name)
        torch.testing.assert_close(rows[name], p.grad, rtol=1e-9, atol=1e-13, msg=name)
        assert p.grad.abs().max() > 1e-12 or name.endswith("bias"), name
    stacked.load_state_dict(model.state_dict())
    network, _ = gather_model(stacked, lambda: Translator(VOCABULARY, Shape(6, DIM, HEADS, FFN), 3))
    torch.testing.assert_close(network(source, lengths, target), model(source, lengths, target))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        stacked.load_state_dict({"blocks.0.cross_q.weight": torch.zeros(DIM, DIM)} | model.state_dict())
    for network in stacked.blocks, EncoderDecoder.from_blocks(model.blocks), model.blocks[0], model.blocks[3]:
        for state in (torch.zeros(3, 2, DIM),) * 3, (torch.zeros(2, 2, DIM),):
            with pytest.raises(TypeError, match=r"the pair \(X, Y\) of both streams as their state, not \d tensors"):
                network(state)
    with pytest.raises(TypeError, match=r"not a Tensor"):
        model.blocks[0](torch.zeros(2, 2, DIM))
    with pytest.raises(AttributeError, match="cannot be replaced"):
        setattr(stacked.blocks, "2", model.blocks[2])


def test_increments_start_small():
    model = Translator(VOCABULARY, Shape(10, 64, 4), 2)
    encoder, decoder = model.blocks[0], model.blocks[2]
    for projection, increments in ((encoder.proj, 4), (decoder.cross_proj, 24), (decoder.down, 24)):
        assert projection.weight.std().item() == pytest.approx(0.02 * 12**0.5 / increments**0.5, rel=0.05)
    assert encoder.qkv.weight.std().item() == pytest.approx(0.02 * 12**0.5, rel=0.05)  # 768 / 64
    assert (model.tokens.weight * 8).std().item() == pytest.approx(1, rel=0.1)
    assert model.head.weight is model.tokens.weight
