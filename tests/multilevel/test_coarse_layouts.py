"""A LayerParallel stack as one of its coarse networks: what lies behind it is put back, whatever goes wrong."""

import pytest
import torch
from torch import nn

from mlpint import MGRIT, LayerParallel, Multilevel
from mlpint import nn as mnn


def training(layers):
    stack = LayerParallel(layers, MGRIT(2, 2, 2, 1, coarse="fitted"))
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
    return stack, optimizer, Multilevel(stack, optimizer, cycles=1, coarse_steps=2)


def kinds():
    return [nn.Linear(4, 4) for _ in range(8)], mnn.BlockStack(8, 4, 2)


@pytest.mark.parametrize("layers", kinds(), ids=["modules", "stacked"])
def test_an_exception_in_a_coarse_phase(layers):
    stack, optimizer, multilevel = training(layers)
    conditions, x = stack.conditions, torch.randn(2, 3, 4)
    coarse = 0
    for phase in multilevel.schedule(2):
        if not phase.fine and not coarse:
            with pytest.raises(RuntimeError, match="inside"), phase:
                assert len(stack) == 4 and stack.layout.layers == phase.layers
                raise RuntimeError("inside")
        coarse += not phase.fine
        with phase:
            stack(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(getattr(stack.conditions, name) == value for name, value in vars(conditions).items())
    assert coarse == 4


@pytest.mark.parametrize("layers", kinds(), ids=["modules", "stacked"])
def test_what_a_network_had_learnt_cannot_be_read(layers):
    stack, optimizer, multilevel = training(layers)
    for phase in multilevel.schedule(1):
        with phase:
            stack(torch.randn(2, 3, 4)).sum().backward()
    learnt = dict(multilevel._runner.learnt())
    assert {name.partition("/")[0] for name in learnt} == {"A", "B"}
    stack, optimizer, multilevel = training(layers)
    conditions = stack.conditions
    with pytest.raises(KeyError):
        multilevel._runner.load_learnt(multilevel.networks, {n: t for n, t in learnt.items() if "passes" not in n})
    assert stack.conditions is conditions and dict(multilevel._runner.learnt()) == {}
    multilevel._runner.load_learnt(multilevel.networks, learnt)
    again = dict(multilevel._runner.learnt())
    assert again.keys() == learnt.keys() and all(torch.equal(again[name], t) for name, t in learnt.items())
    assert stack.conditions is conditions and stack.learnt_tensors() == {}
