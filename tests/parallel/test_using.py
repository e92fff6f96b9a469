"""A stack under other conditions for a while: what holds inside, and that all is as it was afterwards."""

import copy

import pytest
import torch
from torch import nn

from mlpint import MGRIT, LayerParallel
from mlpint import nn as mnn

EXACT, INEXACT = MGRIT(levels=1), MGRIT(2, 2, 2, 1, coarse="fitted")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Dropping(Residual):
    def forward(self, x):
        return x + nn.functional.dropout(torch.tanh(self.linear(x)), 0.5, self.training)


def modules(options=INEXACT, count=8, kind=Residual, **kwargs):
    return LayerParallel([kind() for _ in range(count)], options, **kwargs)


def stacked(options=INEXACT, count=8, **settings):
    return LayerParallel(mnn.BlockStack(count, 4, 2, **settings), options)


def batch():
    return torch.randn(2, 3, 4)


def conditions(stack):
    """All that a block may change, and what lies under it."""
    own = {name: getattr(stack.conditions, name) for name in stack.conditions.__dataclass_fields__}
    children = {name: getattr(child, "indices", None) for name, child in stack.named_children()}
    return own, children


@pytest.mark.parametrize("make", [modules, stacked])
def test_an_exception_inside_puts_everything_back(make):
    stack = make()
    before = conditions(stack)
    with pytest.raises(RuntimeError, match="inside"), stack.using(
        layout=stack.layout.select([0, 2, 4, 6], 2.0),
        options=EXACT,
        keys=iter([(1, 1)]),
        learning=False,
        watch_residuals=True,
        serial_microbatches=2,
        recompute=True,
    ):  # fmt: skip
        assert stack.options == EXACT and stack.watch_residuals and len(stack) == 4
        assert not stack.conditions.learning and stack.conditions.recompute
        assert sorted(stack.store.gradients(())) == [0, 1, 2, 3]
        raise RuntimeError("inside")
    assert conditions(stack) == before


@pytest.mark.parametrize("make", [modules, stacked])
def test_nested(make):
    stack = make()
    outer, inner = stack.layout.select([1, 3, 5, 7], 2.0), stack.layout.select([0, 4], 4.0)
    before = conditions(stack)
    with stack.using(layout=outer, options=EXACT):
        there = conditions(stack)
        with pytest.raises(RuntimeError, match="twice"), stack.using(layout=inner, options=MGRIT(), learning=False):
            assert stack.layout == inner and stack.layout.layers == (0, 4)
            assert sorted(stack.store.gradients(())) == [0, 1]
            raise RuntimeError("twice")
        assert conditions(stack) == there and stack.layout == outer
        with stack.using(watch_residuals=True):
            assert stack.layout == outer and stack.options == EXACT
        assert conditions(stack) == there
    assert conditions(stack) == before


def test_refused_conditions_change_nothing():
    stack = stacked()
    before = conditions(stack)
    coarse = stack.layout.select([0, 4], 4.0)
    for changes, error, text in (
        ({"options": 3}, TypeError, "options must be an mlpint.MGRIT, got int"),
        ({"serial_microbatches": 0}, ValueError, "serial_microbatches = 0"),
        ({"tolerance": 0.1}, AttributeError, "tolerance"),
    ):
        with pytest.raises(error, match=text), stack.using(layout=coarse, **changes):
            raise AssertionError("entered")
        assert conditions(stack) == before


def test_what_is_not_changed_may_be_set_inside():
    stack = modules()
    with stack.using(learning=False):
        stack.options = EXACT
    assert stack.options == EXACT and stack.conditions.learning


@pytest.mark.parametrize("options", [EXACT, MGRIT(2, 2, 2, 2)])
def test_some_of_the_layers(options):
    stack, x = modules(options, step_size=0.5, open_layers=1, close_layers=1, count=10), batch()
    with stack.using(layout=stack.layout.select([1, 3, 5, 7], 2.0)):
        y = stack(x)
        assert stack.stats.total("forward") >= 6
    layers = [stack.local_layers[n] for n in (0, 1, 3, 5, 7, 9)]
    torch.testing.assert_close(y, nn.Sequential(*layers)(x))
    y.sum().backward()  # by the conditions of its forward
    touched = [n for n, layer in stack.local_layers.items() if layer.linear.weight.grad is not None]
    assert touched == [0, 1, 3, 5, 7, 9]


@pytest.mark.parametrize("make", [modules, stacked])
def test_networks_find_what_they_have_learnt_again(make):
    stack = make()
    networks = [stack.layout.select(range(first, 8, 2), 2.0) for first in (0, 1)]
    for layout in networks * 3:
        with stack.using(layout=layout), stacked_rows(stack, layout):
            stack(batch()).sum().backward()
            assert stack.learnt_tensors() == stack.learnt_tensors(layout) != {}
    assert stack.learnt_tensors() == {}
    a, b = (stack.learnt_tensors(layout) for layout in networks)
    assert a.keys() == b.keys() and int(a["forward.fitted.passes"]) == 3
    assert not torch.equal(a["forward.fitted.0.2.0.gram"], b["forward.fitted.0.2.0.gram"])
    solver = stack.solver("forward")
    with stack.using(layout=networks[0]):
        assert stack.solver("forward") is not solver
        coarse_solver = stack.solver("forward")
    with stack.using(layout=stack.layout.select(range(0, 8, 2), 2.0)):
        assert stack.solver("forward") is coarse_solver
    assert stack.solver("forward") is solver
    again = make()
    again.load_learnt_tensors(a, networks[0])
    assert again.learnt_tensors() == {} and again.learnt_tensors(networks[0]).keys() == a.keys()


def stacked_rows(stack, layout):
    """The rows of the layers in the place of all rows, as multilevel training puts them there."""
    from contextlib import contextmanager

    @contextmanager
    def replaced():
        blocks = getattr(stack, "stacked", None)
        before = {} if blocks is None else {n: p for n, p in blocks._parameters.items() if p is not None}
        for name, p in before.items():
            blocks._parameters[name] = nn.Parameter(p.detach()[list(layout.layers)])
        yield
        if blocks is not None:
            blocks._parameters.update(before)

    return replaced()


def test_nothing_is_learnt_without_learning():
    stack = modules()
    stack(batch())
    passes = int(stack.learnt_tensors()["forward.fitted.passes"])
    with stack.using(learning=False):
        stack(batch()).sum().backward()
    assert int(stack.learnt_tensors()["forward.fitted.passes"]) == passes


@pytest.mark.parametrize("options", [EXACT, MGRIT(2, 2, 2, 1)])
def test_repeated_passes_draw_the_same_and_are_not_counted(options):
    stack, x = modules(options, kind=Dropping), batch()
    first, second = stack(x), stack(x)
    keys = list(stack.pass_keys.recent)
    with stack.using(keys=iter(keys)):
        assert torch.equal(stack(x), first) and torch.equal(stack(x), second)
    assert list(stack.pass_keys.recent) == keys and stack.pass_keys.passes == 2
    assert not torch.equal(first, second) and not torch.equal(stack(x), second)


def test_layers_of_a_network_draw_by_their_number_in_it():
    """Layers 2 and 5 as a network of two are what two layers are under the same key."""
    stack, x = modules(EXACT, kind=Dropping), batch()
    pair = LayerParallel([copy.deepcopy(stack.local_layers[n]) for n in (2, 5)], EXACT)
    pair.layer_random.seed = stack.layer_random.seed
    pair.dropout_key(3)
    with stack.using(layout=stack.layout.select([2, 5], 1.0)):
        stack.dropout_key(3)
        y = stack(x)
    assert torch.equal(y, pair(x))
    assert stack.layer_random.draws(2, True) and stack.layer_random._draws.keys() == {(2, True), (5, True)}


def test_a_copy_made_inside_is_under_the_same_conditions():
    stack, x = modules(), batch()
    with stack.using(options=EXACT, layout=stack.layout.select([0, 2], 1.0)):
        clone = copy.deepcopy(stack)
        assert torch.equal(clone(x), stack(x))
    assert clone.options == EXACT and len(clone) == 2 and len(stack) == 8
