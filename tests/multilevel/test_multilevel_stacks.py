"""Multilevel training of BlockStack and LayerParallel stacks, and going on from the middle of a cycle."""

import copy
import io
import json

import pytest
import torch
from torch import nn

from mlpint import MGRIT, LayerParallel, Multilevel
from mlpint.nn import BlockStack

D, HEADS = 8, 2
OPTIMIZERS = {
    "momentum": lambda ps: torch.optim.SGD(ps, 0.02, momentum=0.9, weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, 0.01, betas=(0.9, 0.99)),
}


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.head, self.blocks = nn.Linear(D, 3).double(), blocks

    def forward(self, x):
        if isinstance(self.blocks, nn.ModuleList):
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks(x)
        return self.head(x)


def pair(layers=8, **settings):
    """A model with stacked parameters, and one with a list of the same blocks."""
    torch.manual_seed(1)
    stack = BlockStack(layers, D, HEADS, ffn=12, **settings).double()
    for p in stack.parameters():
        nn.init.normal_(p, std=0.2)
    model = Model(stack)
    other = copy.deepcopy(model)
    other.blocks = stack.to_blocks()
    return model, other


def data(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(3, 4, D, generator=g, dtype=torch.float64)


def train(model, optimizer, total=3, stop=None, resumed=None, **options):
    multilevel = Multilevel(model.blocks, optimizer, **{"cycles": 2, "coarse_steps": 3} | options)
    if resumed is not None:
        multilevel.load_state_dict(resumed)
    for phase in multilevel.schedule(total):
        if multilevel.steps_done == stop:
            break
        with phase:
            loss = model(data(phase.batch_index)).square().mean()
            phase.loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return multilevel


def assert_equal(model, other, tolerance=1e-10):
    weights = model.state_dict()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance)


DEEP = {"levels": 3, "cycles": (2, 1), "coarse_steps": (3, 2)}


@pytest.mark.parametrize(
    ("optimizer", "wrap", "options"),
    [
        ("adamw", False, {"state": "restrict", "neighbours": "average"}),
        ("adamw", True, {"state": "restrict", **DEEP}),
        ("adamw", False, {"state": "carry", **DEEP}),
        ("adamw", False, {"state": "restrict", "step_size": "unit", **DEEP}),
        ("adamw", True, {"state": "carry", "networks": 4, "order": "BA"}),
        ("momentum", True, {"state": "restrict", "neighbours": "average", "networks": 4}),
        ("momentum", False, {"state": "carry", **DEEP}),
    ],
)
def test_stacked_parameters_are_trained_like_a_list_of_blocks(optimizer, wrap, options):
    model, other = pair()
    if wrap:
        model.blocks = LayerParallel(model.blocks, MGRIT(levels=1))
    trained = []
    for m in (model, other):
        o = OPTIMIZERS[optimizer](m.parameters())
        groups = [list(g["params"]) for g in o.param_groups]
        trained.append(train(m, o, **options))
        assert [list(map(id, g["params"])) for g in o.param_groups] == [list(map(id, g)) for g in groups]
        assert set(o.state) <= {p for g in groups for p in g}
    assert_equal(model, other)
    assert trained[0].flops.as_dict()["linear"] == trained[1].flops.as_dict()["linear"] > 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("list", {"state": "restrict", "cycles": "auto", "window": 2}),
        ("list", {"state": "restrict", **DEEP}),
        ("list", {"state": "carry", **DEEP}),
        ("stack", {"state": "restrict", **DEEP}),
        ("stack", {"state": "carry", "data": "same", "order": "alternating"}),
        ("LayerParallel", {"state": "carry", "neighbours": "average"}),
    ],
)
def test_going_on_from_anywhere_is_bit_equal(kind, options):
    def make():
        model, other = pair(4)
        if kind == "list":
            model = other
        elif kind == "LayerParallel":
            model.blocks = LayerParallel(model.blocks, MGRIT(levels=1))
        return model, torch.optim.AdamW(model.parameters(), 0.01)

    model, optimizer = make()
    uninterrupted = train(model, optimizer, total=4, **options)
    for stop in (3, 9, 11):
        first, optimizer = make()
        multilevel = train(first, optimizer, total=4, stop=stop, **options)
        file = io.BytesIO()
        torch.save([first.state_dict(), optimizer.state_dict(), multilevel.state_dict()], file)
        second, optimizer = make()
        file.seek(0)
        weights, state, resumed = torch.load(file, weights_only=True)
        json.dumps(resumed["info"])
        second.load_state_dict(weights)
        optimizer.load_state_dict(state)
        multilevel = train(second, optimizer, total=4, resumed=resumed, **options)
        for name, value in model.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), (stop, name)
        now, then = (
            {k: v for k, v in m.flops.as_dict().items() if k != "seconds"} for m in (multilevel, uninterrupted)
        )
        assert now == then


def test_other_options_than_those_saved_are_refused():
    model, _ = pair(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saved = train(model, optimizer, stop=3).state_dict()
    with pytest.raises(ValueError, match="delta = 0.5: must be 0.25, as it was when the state was saved"):
        Multilevel(model.blocks, optimizer, cycles=2, coarse_steps=3, delta=0.5).load_state_dict(saved)


def test_tensors_of_another_kind_are_refused():
    model, _ = pair(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = train(model, optimizer, stop=3).state_dict()
    state["tensors"]["average/A/1/ln1_weight"] = torch.zeros(D)
    with pytest.raises(ValueError, match="tensor 'average/A/1/ln1_weight': this training has no place for it"):
        Multilevel(model.blocks, optimizer, cycles=2, coarse_steps=3).load_state_dict(state)


def test_what_stacks_cannot_do_is_refused():
    model, _ = pair(4)
    with pytest.raises(ValueError, match="does not own 'ln1_weight' of the stack"):
        Multilevel(model.blocks, torch.optim.SGD(model.head.parameters(), 0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    blocks = LayerParallel(model.blocks, open_layers=1, close_layers=1)
    with pytest.raises(ValueError, match="open_layers = 1, close_layers = 1: must be 0 for multilevel training"):
        Multilevel(blocks, torch.optim.SGD(blocks.parameters(), 0.1))
    blocks = LayerParallel(model.blocks, MGRIT(coarse="sum"), layout="cyclic")
    with pytest.raises(ValueError, match="coarse networks run in layout='block' only"):
        Multilevel(blocks, torch.optim.SGD(blocks.parameters(), 0.1))
    model.blocks.requires_grad_(False)
    with pytest.raises(RuntimeError, match="state_dict inside Phase"):
        multilevel = Multilevel(model.blocks, optimizer)
        with next(multilevel.schedule(1)):
            multilevel.state_dict()


@pytest.mark.parametrize("kind", ["modules", "stacked"])
def test_mgrit_on_a_coarse_network_with_open_and_close_layers(kind):
    """A coarse phase of a stack is the LayerParallel of its layers with longer steps."""
    open_layers = 1 if kind == "modules" else 0
    options = {"open_layers": open_layers, "close_layers": open_layers, "step_size": 0.5}
    stack, blocks = (m.blocks for m in pair(8 + 2 * open_layers))
    chosen = {"A": [1, 3, 5, 7], "B": [0, 2, 4, 6]}
    if open_layers:
        chosen = {name: [0, *(n + 1 for n in layers), 9] for name, layers in chosen.items()}
    solver = MGRIT(cfactor=2, forward_iters=1, backward_iters=1)
    fine = LayerParallel(stack if kind == "stacked" else copy.deepcopy(blocks), solver, **options)
    x, seen = data(0), {}
    for phase in Multilevel(fine, torch.optim.SGD(fine.parameters(), 0.1), cycles=1, coarse_steps=1).schedule(1):
        with phase:
            seen[phase.name] = fine(x), fine.stats.evaluations["forward"]
    for name, layers in chosen.items():
        options["step_size"] = 1.0
        alone = LayerParallel([blocks[n] for n in layers], solver, **options)
        torch.testing.assert_close(seen[name][0], alone(x))
        assert seen[name][1] == alone.stats.evaluations["forward"]
    assert len(fine) == len(blocks) and fine.step_size_of(open_layers) == 0.5


def test_averaging_goes_through_the_kernel_where_it_is_chosen(monkeypatch):
    called = []

    class Kernel:
        @staticmethod
        def average_(fine, coarse, rows, delta):
            called.append((rows, delta, len(fine)))
            for f, c in zip(fine, coarse, strict=True):
                f[rows].lerp_(c, delta)

    model, other = pair(4)
    train(other, torch.optim.SGD(other.parameters(), 0.05))
    monkeypatch.setattr("mlpint.multilevel.stack_copies.kernel", lambda op, *_: Kernel if op == "average" else None)
    train(model, torch.optim.SGD(model.parameters(), 0.05))
    assert_equal(model, other)
    assert called == [(slice(1, 4, 2), 0.25, 12), (slice(0, 3, 2), 0.25, 12)] * 2
