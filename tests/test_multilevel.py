"""Multilevel training against the same training written out with explicit lists of blocks."""

import pytest
import torch
from reference_multilevel import Net, Reference, adamw, batches, momentum, sgd
from torch import nn

from mlpint import LayerParallel, MGRIT, Multilevel

RULES = {
    "sgd": (sgd, lambda ps, lr: torch.optim.SGD(ps, lr)),
    "momentum": (momentum, lambda ps, lr: torch.optim.SGD(ps, lr, momentum=0.9)),
    "adamw": (adamw, lambda ps, lr: torch.optim.AdamW(ps, lr, betas=(0.9, 0.99), weight_decay=0.1)),
}
LR = {"sgd": 0.05, "momentum": 0.02, "adamw": 0.01}


def net_of(layers=8, container=nn.Sequential):
    torch.manual_seed(3)
    return Net(layers, container=container).double()


def run(net, optimizer, total, stream, **options):
    """The user's loop."""
    multilevel = Multilevel(net.blocks, optimizer, **options)
    losses = []
    for phase in multilevel.schedule(total):
        with phase:
            loss = net.loss(next(stream))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append((phase.name, float(loss.detach())))
    return multilevel, losses


def compare(rule="sgd", layers=8, total=4, container=nn.Sequential, wrap=False, tolerance=1e-12, **options):
    net = net_of(layers, container)
    step, make = RULES[rule]
    state = options.get("state", "restrict")
    reference = Reference(
        net,
        step,
        LR[rule],
        delta=options.get("delta", 0.25),
        networks=options.get("networks", 2),
        ode=options.get("step_size", "ode") == "ode",
        state=state,
        neighbours=options.get("neighbours", "none"),
        rewarm=options.get("rewarm", 10),
    )
    cycles, coarse_steps = options.setdefault("cycles", 2), options.setdefault("coarse_steps", 3)
    cycles = cycles if isinstance(cycles, tuple) else (cycles,)
    coarse_steps = coarse_steps if isinstance(coarse_steps, tuple) else (coarse_steps,)
    expected = reference.train(
        reference.blocks, 1.0, total, cycles, coarse_steps, iter(batches(200)), order=options.get("order", "AB"),
        single=options.get("single", False),
    )  # fmt: skip
    if wrap:
        net.blocks = LayerParallel(net.blocks, MGRIT(levels=1))
    _, losses = run(net, make(net.parameters(), LR[rule]), total, iter(batches(200)), **options)
    assert [name for name, _ in losses] == [name for name, _ in expected]
    assert max(abs(a - b) for (_, a), (_, b) in zip(losses, expected, strict=True)) < tolerance
    assert reference.error(net) < tolerance


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_follows_the_method_written_out(container):
    compare(container=container)


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 0.0},
        {"delta": 1.0},
        {"order": "BA"},
        {"order": "alternating", "cycles": 3},
        {"step_size": "unit"},
        {"single": True},
        {"networks": 4},
        {"neighbours": "average"},
        {"neighbours": "correction", "networks": 4},
        {"levels": 3, "cycles": (2, 1), "coarse_steps": (3, 2)},
        {"levels": 3, "cycles": (2, 3), "coarse_steps": (3, 2), "step_size": "unit"},
        {"levels": 4, "cycles": (1, 1, 1), "coarse_steps": (2, 2, 2), "neighbours": "average"},
        {"cycles": 9},
        {"cycles": 0},
    ],
    ids=str,
)
def test_options(options):
    compare(**options)


@pytest.mark.parametrize("state", ["restrict", "separate", "reset", "carry"])
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_optimiser_state(rule, state):
    compare(rule, state=state, rewarm=2, tolerance=1e-10)
    compare(rule, state=state, levels=3, cycles=(2, 1), coarse_steps=(3, 2), rewarm=2, tolerance=1e-10)
