"""parallelize: which stack it finds, what it refuses, and that the changed model does what the unchanged one does."""

import pytest
import torch
from torch import nn

from mlpint import LayerParallel
from mlpint.hf import parallelize
from mlpint.hf.families import stack_type
from mlpint.hf.looped_stack import LoopedStack
from mlpint.nn import BlockStack
from mlpint.parallel.replicas import check_replicas
from scenarios import check, names

JOBS = [("alone", 1), ("mpich", 2), ("mpich", 3)]


@pytest.mark.parametrize("scenario", names("replaced.py"))
@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_plain_models(scenario, launcher, ranks):
    check("replaced.py", scenario, launcher, ranks)


@pytest.mark.parametrize("scenario", names("pretrained.py"))
@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_transformers_models(scenario, launcher, ranks):
    pytest.importorskip("transformers")
    check("pretrained.py", scenario, launcher, ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_replicas_stay_equal(ranks):
    check("drift.py", "a_thousand_steps", "mpich", ranks)


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
