"""The FLOP meter against torch's FlopCounterMode over a real forward and backward."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from mlpint import MGRIT, LayerParallel, Multilevel
from mlpint.flops import FlopMeter
from mlpint.nn import BlockStack, EncoderDecoder
from mlpint.training.models import GPT, Shape
from reference_multilevel import Net, batches


def counted(function):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def gpt(**options):
    return GPT(vocabulary=31, sequence=12, shape=Shape(layers=3, dim=16, heads=2), **options)


@pytest.mark.parametrize("tied", [True, False])
def test_formula_agrees_with_the_counter(tied):
    model = gpt(tied=tied)
    tokens = torch.randint(31, (4, 12))
    total = counted(lambda: cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward())
    x = torch.randn(4, 12, 16, requires_grad=True)
    blocks = counted(lambda: model.blocks(x).sum().backward())
    meter = FlopMeter(model.blocks, model)
    with meter.step():
        cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert (meter.blocks, meter.all) == (blocks, total)
    assert meter.attention == 3 * 3 * 4 * 4 * 12 * 12 * 16
    assert meter.tokens == 48 and meter.steps == {"fine": 1} and meter.seconds > 0


@pytest.mark.parametrize("wrap", [lambda blocks: blocks, lambda blocks: LayerParallel(blocks, MGRIT(levels=1))])
def test_unknown_blocks_and_edges_are_measured(wrap):
    class Edge(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return x @ self.weight @ self.weight.T

    net = Net(4)
    net.embed = nn.Sequential(Edge(), net.embed)
    (x, y), *_ = batches(1)
    x, y = x.float().requires_grad_(), y.float()  # an input that needs no gradient would save the last product
    total = counted(lambda: net.loss((x, y)).backward())
    net.blocks = wrap(net.blocks)
    meter = FlopMeter(net.blocks, net)
    with meter.step():
        net.loss((x, y)).backward()
    assert meter.all == total and meter.blocks == 4 * 3 * 2 * 5 * 2 * 4 * 6


def test_a_stack_and_a_list_of_blocks_count_alike():
    stack = BlockStack(3, 16, 2, ffn=40)
    x = torch.randn(2, 7, 16, requires_grad=True)
    list_meter, stack_meter = FlopMeter(stack.to_blocks()), FlopMeter(stack)
    with stack_meter.step():
        stack(x).sum().backward()
    blocks = stack.to_blocks()
    list_meter = FlopMeter(blocks)
    with list_meter.step():
        y = x
        for block in blocks:
            y = block(y)
    assert stack_meter.as_dict()["linear"] == list_meter.as_dict()["linear"] == 3 * 3 * 2 * 14 * (4 * 256 + 2 * 16 * 40)
    assert stack_meter.attention == list_meter.attention


def test_blocks_of_todays_models_count_as_the_counter_does():
    modern = {"normalization": "rms", "feed_forward": "silu gated", "biases": "none", "positions": "rotary"}
    stack = BlockStack(2, 16, 4, ffn=24, kv_heads=2, head_width=6, qk_norm=True, **modern)
    x = torch.randn(2, 7, 16, requires_grad=True)
    total = counted(lambda: stack(x).sum().backward())
    meter = FlopMeter(stack)
    with meter.step():
        stack(x).sum().backward()
    assert meter.blocks == total


@pytest.mark.parametrize("wrap", [lambda stack: stack, lambda stack: LayerParallel(stack, MGRIT(levels=1))])
def test_an_encoder_decoder_counts_as_the_counter_does(wrap):
    encoder, decoder = BlockStack(2, 16, 4, ffn=24, attention="full"), BlockStack(3, 16, 2, cross=True)
    x, y = torch.randn(2, 7, 16, requires_grad=True), torch.randn(2, 5, 16, requires_grad=True)
    alone = FlopMeter(decoder)
    with alone.step():
        total = counted(lambda: decoder(y, memory=x).sum().backward())
    assert alone.blocks == total
    stack = EncoderDecoder(encoder, decoder)
    total = counted(lambda: stack((x, y))[1].sum().backward())
    network = wrap(stack)
    meter = FlopMeter(network)
    with meter.step():
        network((x, y))
    assert meter.blocks == total
    with pytest.raises(ValueError, match="pass mlpint.nn.EncoderDecoder.from_blocks"):
        FlopMeter(stack.to_blocks())
    for blocks in (stack, network):
        with pytest.raises(ValueError, match="coarse networks need blocks of one shape"):
            Multilevel(blocks, torch.optim.SGD(blocks.parameters(), 0.1), cycles=1, coarse_steps=1, levels=2)


def test_only_training_inside_a_step_counts():
    model = gpt()
    meter, tokens = FlopMeter(model.blocks, model), torch.randint(31, (2, 5))
    model(tokens)
    with meter.step(), torch.no_grad():
        model(tokens)
    assert meter.all == meter.tokens == 0
    with meter.step("A", layers=1):
        model(tokens)
        model(tokens)
    once = meter.all
    with meter.step("fine"):
        model(tokens)
    assert meter.steps == {"fine": 2, "A": 1}
    assert meter.all - once - meter.outside // 3 == 3 * (meter.blocks // 5)

    with pytest.raises(KeyError), meter.step("fine"):
        raise KeyError
    assert meter.steps == {"fine": 2, "A": 1}  # a step that raised was not taken

    other = FlopMeter(model.blocks)
    other.load(meter.as_dict())
    assert other.as_dict() == meter.as_dict()
