"""Multilevel training against the same training written out with explicit lists of blocks."""

import pytest
import torch
from torch import nn

from mlpint import MGRIT, LayerParallel, Multilevel
from reference_multilevel import Net, Reference, adamw, batches, momentum, sgd

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


def test_gradients_set_to_zero_move_no_block_outside_the_network():
    net = net_of(4)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    stream = iter(batches(100))
    for phase in Multilevel(net.blocks, optimizer, cycles=1, coarse_steps=2, delta=0).schedule(2):
        before = [p.detach().clone() for p in net.blocks.parameters()]
        with phase:
            net.loss(next(stream)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        moved = [not torch.equal(a, b) for a, b in zip(before, net.blocks.parameters(), strict=True)]
        assert all(moved) if phase.fine else not any(moved)  # delta 0: the fine network keeps its weights


def test_between_phases_the_model_is_the_fine_network():
    net, other = net_of(4), net_of(4)
    optimizer, plain = torch.optim.SGD(net.parameters(), 0.05), torch.optim.SGD(other.parameters(), 0.05)
    stream, batch = iter(batches(100)), batches(1, seed=9)[0]
    other.loss(batches(1)[0]).backward()
    plain.step()
    for step, phase in enumerate(Multilevel(net.blocks, optimizer, cycles=1, coarse_steps=4).schedule(1)):
        with phase:
            net.loss(next(stream)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step < 4:  # not prolonged yet; embedding and head are those in training
            for p, q in zip(net.blocks.parameters(), other.blocks.parameters(), strict=True):
                assert torch.equal(p, q)
            other.embed.load_state_dict(net.embed.state_dict())
            other.head.load_state_dict(net.head.state_dict())
            assert torch.equal(net.loss(batch), other.loss(batch))
    assert step == 8
    assert not torch.equal(net.loss(batch), other.loss(batch))


def test_flops_by_network():
    net = net_of(8)
    multilevel, _ = run(net, torch.optim.SGD(net.parameters(), 0.01), 3, iter(batches(100)), cycles=2, coarse_steps=5)
    meter = multilevel.flops
    assert meter.steps == {"fine": 3, "A": 10, "B": 10} and multilevel.steps_done == 23
    assert meter.blocks == (3 * 8 + 20 * 4) * 3 * 2 * 5 * 2 * 4 * 6 and meter.tokens == 23 * 5


def phases(total, layers=8, **options):
    """Schedules without training."""
    net = net_of(layers)
    multilevel = Multilevel(net.blocks, torch.optim.SGD(net.parameters(), 0.1), **options)
    found = []
    for phase in multilevel.schedule(total):
        with phase:
            found.append(phase)
    return found


def test_what_a_phase_tells():
    options = {"cycles": 2, "coarse_steps": 3}
    found = phases(4, **options)
    assert [p.name for p in found] == ["fine", *"AAABBB", "fine", *"AAABBB", "fine", "fine"]
    assert [p.batch_index for p in found] == list(range(16))
    assert [p.clock for p in found] == [0] * 7 + [1] * 7 + [2, 3] and {p.clock_steps for p in found} == {4}
    assert found[0].layers == tuple(range(8)) and found[1].layers == (1, 3, 5, 7) and found[4].layers == (0, 2, 4, 6)
    assert [p.level for p in found[:2]] == [0, 1] and found[0].fine and not found[1].fine

    found = phases(4, **options, data="same", clock="own")
    assert [p.batch_index for p in found] == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9]
    assert [p.clock for p in found if p.fine] == [0, 1, 2, 3]
    coarse = [p for p in found if not p.fine]
    assert [p.clock for p in coarse] == list(range(12)) and {p.clock_steps for p in coarse} == {12}

    deep = phases(2, **options, levels=3)
    assert [p.name for p in deep][:11] == ["fine", "A", *["AA"] * 3, *["AB"] * 3, "A", "A", "B"]
    assert [len(deep), deep[-1].batch_index] == [38, 37]
    same = phases(2, **options, levels=3, data="same")
    assert same[-1].batch_index == 13
    two = phases(2, cycles=(1, 2), coarse_steps=(3, 2), levels=3)
    assert [p.name for p in two if p.name[0] == "B"] == ["B", "BA", "BA", "BB", "BB"] * 2 + ["B"]


def test_the_user_needs_no_more_batches_than_announced():
    for options in ({}, {"levels": 3}, {"data": "same"}, {"levels": 3, "cycles": (5, 3)}, {"single": True}):
        options = {"cycles": 2, "coarse_steps": 3, **options}
        needed = max(p.batch_index for p in phases(4, **options)) + 1
        net = net_of(8)
        multilevel = Multilevel(net.blocks, torch.optim.SGD(net.parameters(), 0.1), **options)
        multilevel.schedule(4, batches=needed)
        with pytest.raises(ValueError, match=f"takes {needed} batches .* the data has {needed - 1}: lower total_steps"):
            multilevel.schedule(4, batches=needed - 1)


def test_learning_rate_of_coarse_steps():
    net = net_of(4)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    options = {"cycles": 1, "coarse_steps": 4, "coarse_lr": 0.5, "state": "reset", "rewarm": 2}
    used = []

    def spy(optimizer, *_):
        used.append(optimizer.param_groups[0]["lr"])

    for phase in Multilevel(net.blocks, optimizer, **options).schedule(2):
        with phase:
            optimizer.param_groups[0]["lr"] = 0.4 if phase.fine else 0.8
            handle = optimizer.register_step_pre_hook(spy)
            net.loss(batches(1)[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.remove()
            assert optimizer.param_groups[0]["lr"] == (0.4 if phase.fine else 0.8)
    assert used == pytest.approx([0.4, *[0.2, 0.4, 0.4, 0.4] * 2, 0.4])
