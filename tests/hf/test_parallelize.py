"""parallelize: which stack it finds, what it refuses, and that the changed model does what the unchanged one does."""

import dataclasses

import pytest
import torch
from torch import nn

from mlpint import LayerParallel
from mlpint.hf import parallelize, stacked
from mlpint.hf.families import stack_type
from mlpint.hf.looped_stack import LoopedStack
from mlpint.hf.stacked import StackedLoop
from mlpint.nn import BlockStack, EncoderDecoder
from mlpint.parallel.replicas import check_replicas
from scenarios import check, names

JOBS = [("alone", 1), ("mpich", 2), ("mpich", 3)]


@pytest.mark.parametrize("scenario", names("replaced.py"))
@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_plain_models(scenario, launcher, ranks):
    check("replaced.py", scenario, launcher, ranks)


@pytest.mark.parametrize("scenario", names("pretrained.py"))
@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), ("mpich", 3)])
def test_transformers_models(scenario, launcher, ranks):
    pytest.importorskip("transformers")
    check("pretrained.py", scenario, launcher, ranks)


def test_replicas_stay_equal():
    check("drift.py", "a_thousand_steps", "mpich", 3)


class Block(nn.Module):
    def __init__(self, more=False):
        super().__init__()
        self.linear, self.more = nn.Linear(4, 4), more

    def forward(self, x):
        y = x + torch.tanh(self.linear(x))
        return (y, x) if self.more else y


class Head(Block):
    pass


class Model(nn.Module):
    """Has the lists it is given by name, and runs through the one called blocks."""

    def __init__(self, **lists):
        super().__init__()
        for name, layers in lists.items():
            setattr(self, name, nn.ModuleList(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def blocks(count, **arguments):
    return [Block(**arguments) for _ in range(count)]


def large(count):
    return [nn.TransformerEncoderLayer(4, 1) for _ in range(count)]


def stack_of(model):
    (name,) = [name for name, module in model.named_modules() if isinstance(module, LayerParallel)]
    return name


def test_block_stack():
    model = Model(heads=[Head() for _ in range(2)])
    model.deep = BlockStack(3, 4, 1)
    assert stack_of(parallelize(model)) == "deep"
    model = Model(heads=[Head() for _ in range(2)])
    model.both = EncoderDecoder(BlockStack(2, 4, 1), BlockStack(2, 4, 1, cross=True))
    assert stack_of(parallelize(model)) == "both"


def test_longest_and_largest():
    model = Model(blocks=blocks(5), heads=[Head() for _ in range(3)], mixed=[Block(), Head()], single=blocks(1))
    assert stack_of(parallelize(model)) == "blocks"


def test_elementary_modules_are_no_layers():
    model = Model(norms=[nn.LayerNorm(4) for _ in range(9)], blocks=blocks(3))
    model.classifier = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model.towers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4))
    assert stack_of(parallelize(model)) == "blocks"


def test_lists_inside_layers_are_no_stacks():
    outer = blocks(3)
    for block in outer:
        block.experts = nn.ModuleList(blocks(8))
    assert stack_of(parallelize(Model(blocks=outer))) == "blocks"


def test_found_in_a_submodule():
    model = Model()
    model.encoder = Model(blocks=blocks(3))
    assert stack_of(parallelize(model)) == "encoder.blocks"


def test_named():
    model = Model(blocks=blocks(2), others=blocks(6))
    assert stack_of(parallelize(model, stack="blocks")) == "blocks"
    assert isinstance(model.others, nn.ModuleList)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, r"no stack of layers in Linear: looked for .* name it with stack="),
        (lambda: Model(blocks=blocks(1)), {}, r"no stack of layers in Model"),
        (
            lambda: parallelize(Model(blocks=blocks(3))),
            {},
            r"no stack of layers in Model beside the layer-parallel one at 'blocks'",
        ),
        (
            lambda: Model(left=blocks(3), right=blocks(3)),
            {},
            r'several stacks of layers; name one: stack="left" \(3 layers\) or stack="right" \(3 layers\)',
        ),
        (
            lambda: Model(heads=[Head() for _ in range(9)], blocks=large(3)),
            {},
            r'name one: stack="heads" \(9 layers\) or stack="blocks" \(3 layers\)',
        ),
        (lambda: nn.Sequential(*blocks(3)), {}, r"Sequential is itself the stack .* LayerParallel\(model"),
        (
            lambda: Model(blocks=blocks(3)),
            {"stack": "layers"},
            r"stack = 'layers' is no module in Model: must name .*; name one: stack=\"blocks\" \(3 layers\)",
        ),
        (lambda: Model(blocks=blocks(3)), {"stack": "blocks.0"}, r"stack = 'blocks.0' is a Block in Model"),
        (lambda: Model(blocks=blocks(3)), {"stack": ""}, r"stack = '' is a Model in Model"),
        (lambda: Model(blocks=blocks(3)), {"open_layers": 3}, r"open_layers \+ close_layers = 3 \+ 0"),
    ],
)
def test_refused(make, arguments, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        parallelize(model, **arguments)


def test_parameter_inside_and_outside():
    model = Model(blocks=blocks(3))
    model.head = nn.Linear(4, 4)
    model.head.weight = model.blocks[1].linear.weight
    with pytest.raises(ValueError, match=r"parameter head.weight is also blocks.1.linear.weight: .*; untie it"):
        parallelize(model)
    assert isinstance(model.blocks, nn.ModuleList)


def test_layer_outside_too():
    model = Model(blocks=blocks(3))
    model.first = model.blocks[0]
    with pytest.raises(ValueError, match=r"parameter first.linear.weight is also blocks.0.linear.weight"):
        parallelize(model)


def test_dropped_layers():
    model = Model(blocks=blocks(3))
    model.layerdrop = 0.1
    with pytest.raises(ValueError, match=r"layerdrop = 0.1 in Model"):
        parallelize(model)
    model.layerdrop = 0.0
    parallelize(model)


def test_more_than_the_state_returned():
    model = parallelize(Model(blocks=blocks(3, more=True)))
    with pytest.raises(ValueError, match=r"the model changes the state between layer 0 and layer 1"):
        model(torch.randn(2, 4))


def test_layers_one_by_one():
    stack = parallelize(Model(blocks=blocks(3))).blocks
    assert len(stack) == 3
    assert len(list(stack)) == len(stack[:]) == len(stack[0:7]) == 3 and len(stack[1:]) == 2
    assert isinstance(stack[-1], Block)
    assert stack[2].linear.weight is stack.local_layers[2].linear.weight  # what is done to it is done to the layer
    with pytest.raises(ValueError, match=r"layer 1 of a layer-parallel stack is called by itself"):
        stack[1](torch.randn(2, 4))
    x = torch.randn(2, 4)
    pending = stack[0](x)
    assert pending.shape == x.shape
    for use in (
        lambda: pending + x,
        lambda: stack[2](pending),
        lambda: stack[1](x),
        lambda: stack[1](pending, pending),
    ):
        with pytest.raises(ValueError, match="a layer-parallel stack can only run loops that hand the state"):
            use()
    with pytest.raises(IndexError):
        stack[3]
    assert stack[0].training
    assert not stack.eval()[0].training


def test_mode_is_kept():
    model = Model(blocks=blocks(3)).eval()
    model.blocks[1].train()
    stack = parallelize(model).blocks
    assert not stack.training
    assert [stack[n].training for n in range(3)] == [False, True, False]
    assert [layer.training for layer in stack.local_layers.values()] == [False, True, False]


def test_asking_a_layer_for_its_attentions():
    class Asking(Block):
        def forward(self, x, output_attentions=False):
            return super().forward(x)

    class Asker(Model):
        def forward(self, x, asked):
            for block in self.blocks:
                x = block(x, asked)
            return x

    model = parallelize(Asker(blocks=[Asking() for _ in range(3)]))
    model(torch.randn(2, 4), False)
    with pytest.raises(ValueError, match=r"output_attentions = True: .* pass output_attentions=False"):
        model(torch.randn(2, 4), True)


def test_position_bias():
    class Biased(Block):
        def forward(self, x, position_bias=None):
            return super().forward(x)

    model = Model(blocks=[Biased() for _ in range(3)])
    assert stack_type(model, "blocks") is LoopedStack  # an argument of that name is not T5's way to hand it on


def test_replicas_of_a_model_without_stacks():
    assert check_replicas(nn.Linear(2, 2)) == []


def llama(**more):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | {"vocab_size": 30} | more))


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def frozen(model):
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)


def in_two_dtypes(model):
    model.model.layers[0].input_layernorm.double()


def with_more(model):
    model.model.layers[2].mlp.gate_proj.register_parameter("more", nn.Parameter(torch.ones(1)))


def of_another_class(model):
    model.model.layers[1].self_attn.q_proj = type("Mine", (nn.Linear,), {})(16, 16, bias=False)


def with_a_patched_forward(model):
    layer = model.model.layers[1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)


def sharing(model):
    model.model.layers[2].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


def with_checkpointing(model):
    model.gradient_checkpointing_enable()


def with_attention_of_its_own(model):
    model.config._attn_implementation = "flash_attention_2"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "layer 1.mlp has hooks"),
        (frozen, "mlp.up_proj.weight of layer 2 has another dtype, device or requires_grad"),
        (in_two_dtypes, "input_layernorm.weight is torch.float64, and other parameters of the layer are not"),
        (with_more, "layer 2 has other parameters than its kind: mlp.gate_proj.more"),
        (of_another_class, "layer 1.self_attn.q_proj is a Mine"),
        (with_a_patched_forward, "layer 1 has another forward than its class"),
        (sharing, "self_attn.q_proj.weight of layer 2 is a parameter of another layer, too"),
        (with_checkpointing, "layer 0 has gradient checkpointing on; enable it afterwards"),
        (with_attention_of_its_own, "attn_implementation = 'flash_attention_2'"),
    ],
)
def test_layers_that_are_no_blocks_say_why(change, reason):
    model = llama()
    change(model)
    before = [*model.modules()]
    with pytest.raises(
        ValueError, match=f"stacked = True: the layers of LlamaForCausalLM cannot be stacked: ({reason})"
    ):
        parallelize(model, stacked=True, check=False)
    assert [*model.modules()] == before
    with pytest.warns(UserWarning, match=f"({reason}).*; they are evaluated one by one"):
        parallelize(model, stacked="auto", check=False)
    assert type(model.model.layers) is LoopedStack


def test_stacked_where_it_can_be(recwarn):
    model = parallelize(llama(), stacked="auto")
    assert isinstance(model.model.layers, StackedLoop) and not [w for w in recwarn if "stacked" in str(w.message)]
    assert "BlockStack" in repr(model)
    with pytest.raises(ValueError, match="stacked = 'yes': must be"):
        parallelize(llama(), stacked="yes")
    with pytest.raises(ValueError, match="it is no model of the transformers library"):
        parallelize(Model(blocks=blocks(3)), stacked=True)


def test_blocks_that_compute_something_else_are_found(monkeypatch):
    """The trial before anything is trained, with and without padding."""
    true = stacked.stack_of

    def false(layers, config):
        blocks = true(layers, config)
        blocks.settings = dataclasses.replace(blocks.settings, eps=1.0)
        return blocks

    monkeypatch.setattr(stacked, "stack_of", false)
    with pytest.raises(ValueError, match="computes something else"):
        parallelize(llama(), stacked=True)
    model = llama()
    with pytest.warns(UserWarning, match="computes something else"):
        parallelize(model, stacked="auto")
    assert type(model.model.layers) is LoopedStack
