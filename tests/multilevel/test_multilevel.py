"""Multilevel training against the same training written out with explicit lists of blocks."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mlpint import MGRIT, LayerParallel, Multilevel
from mlpint.errors import DataError
from mlpint.multilevel.stopping import StoppingRule
from reference_multilevel import Block, Net, Reference, adamw, batches, momentum, sgd

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
    compare("adamw", container=container, wrap=True, levels=3, cycles=(2, 1), coarse_steps=(3, 2), tolerance=1e-10)


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
        {"neighbours": "average", "networks": 4},
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


@pytest.mark.parametrize("state", ["restrict", "carry"])
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_optimiser_state(rule, state):
    compare(rule, state=state, tolerance=1e-10)
    compare(rule, state=state, levels=3, cycles=(2, 1), coarse_steps=(3, 2), tolerance=1e-10)


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
    entered = []
    for phase in multilevel.schedule(total):
        with phase:
            entered.append(phase)
    return entered


def test_what_a_phase_tells():
    options = {"cycles": 2, "coarse_steps": 3}
    entered = phases(4, **options)
    assert [p.name for p in entered] == ["fine", *"AAABBB", "fine", *"AAABBB", "fine", "fine"]
    assert [p.batch_index for p in entered] == list(range(16))
    assert [p.clock for p in entered] == [0] * 7 + [1] * 7 + [2, 3] and {p.clock_steps for p in entered} == {4}
    assert (
        entered[0].layers == tuple(range(8)) and entered[1].layers == (1, 3, 5, 7) and entered[4].layers == (0, 2, 4, 6)
    )
    assert [p.level for p in entered[:2]] == [0, 1] and entered[0].fine and not entered[1].fine

    # Two cycles: a fine step, then 3 + 3 of half the layers, which make 3; then two fine steps.
    entered = phases(4, **options, clock="work")
    assert [p.clock for p in entered] == [0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7, 8, 9]
    assert {p.clock_steps for p in entered} == {10}
    entered = phases(4, **options, data="same")
    assert [p.batch_index for p in entered] == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9]

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
    options = {"cycles": 1, "coarse_steps": 4, "coarse_lr": 0.5}
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
    assert used == pytest.approx([0.4, *[0.4] * 4 * 2, 0.4])


@pytest.mark.parametrize(
    ("options", "layers", "message"),
    [
        ({}, 9, "9 layers cannot be split evenly into 2 .* multiple of 2; take 8 or 10 layers"),
        ({}, 1, "1 layers cannot be split .* take 2 layers"),
        ({"levels": 3}, 6, "multiple of 4; take 4 or 8 layers"),
        ({"networks": 3}, 8, "multiple of 3; take 6 or 9 layers"),
        ({"delta": -0.1}, 8, r"delta = -0.1: must be a number in \[0, 1\]"),
        ({"delta": 1.5}, 8, r"delta = 1.5: must be a number in \[0, 1\]"),
        ({"delta": float("nan")}, 8, "delta = nan: must be"),
        ({"delta": True}, 8, "delta = True: must be"),
        ({"coarse_steps": 0}, 8, "coarse_steps = 0: must be an integer of at least 1"),
        ({"coarse_steps": (1, 2)}, 8, r"coarse_steps = \(1, 2\): must be one number, or 1 for levels = 2"),
        ({"cycles": -1}, 8, "cycles = -1: must be an integer of at least 0 or 'auto'"),
        ({"cycles": (3, "auto"), "levels": 3}, 8, "cycles = .* must be an integer"),
        ({"cycles": "auto", "clock": "work"}, 8, "clock = 'work': its length is not known"),
        ({"single": 2}, 8, "single = 2: must be one of False, True"),
        ({"clock": "own"}, 8, "clock = 'own': must be one of shared, work"),
        ({"neighbours": "correction"}, 8, "neighbours = 'correction': must be one of none, average"),
        ({"networks": 1}, 8, "networks = 1: must be an integer of at least 2"),
        ({"levels": 1}, 8, "levels = 1: must be an integer of at least 2"),
        ({"order": "ba"}, 8, "order = 'ba': must be one of AB, BA, alternating"),
        ({"state": "none"}, 8, "state = 'none': must be one of restrict, carry"),
        ({"coarse_lr": -1}, 8, "coarse_lr = -1: must be a number of at least 0"),
    ],
)
def test_bad_options(options, layers, message):
    net = net_of(layers)
    with pytest.raises(ValueError, match=message):
        Multilevel(net.blocks, torch.optim.SGD(net.parameters(), 0.1), **options)


def test_bad_blocks_and_optimisers():
    net = net_of(4)
    sgd_of = lambda module: torch.optim.SGD(module.parameters(), 0.1)  # noqa: E731
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got list"):
        Multilevel(net.blocks, list(net.parameters()))
    with pytest.raises(ValueError, match="does not own 'up.weight' of block 0: pass the one that trains the blocks"):
        Multilevel(net.blocks, sgd_of(net.head))
    with pytest.raises(ValueError, match="total_steps = 0: must be an integer of at least 1"):
        Multilevel(net.blocks, sgd_of(net)).schedule(0)
    with pytest.raises(TypeError, match="detla"):
        Multilevel(net.blocks, sgd_of(net), detla=0.5)
    net.blocks[2].up = nn.Linear(4, 5)
    net.blocks[2].down = nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"blocks 0 and 2 differ: 'up.weight' is \(6, 4\) in one and \(5, 4\) in the"):
        Multilevel(net.blocks, sgd_of(net))
    net = net_of(4)
    net.blocks[3].up = net.blocks[1].up
    with pytest.raises(ValueError, match="blocks 1 and 3 share 'up.weight'"):
        Multilevel(net.blocks, sgd_of(net))


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.Adagrad])
def test_a_state_that_cannot_be_averaged_is_refused_unless_it_need_not_be(optimizer):
    net = net_of(4)
    with pytest.raises(ValueError, match="optimiser.* of layer 1's up.weight.*pass state='carry'"):
        run(net, optimizer(net.parameters(), 0.01), 2, iter(batches(99)), cycles=1, coarse_steps=2)
    assert "forward" not in net.blocks[0].__dict__
    run(net, optimizer(net.parameters(), 0.01), 2, iter(batches(99)), cycles=1, coarse_steps=2, state="carry")


def test_the_end_of_the_data_is_named():
    net = net_of(4)
    with pytest.raises(DataError, match="data ended in optimiser step 4, phase 'B' of fine step 1.*lower total_steps"):
        run(net, torch.optim.SGD(net.parameters(), 0.1), 2, iter(batches(3)), cycles=1, coarse_steps=2)


def test_phases_are_entered_once_and_in_order():
    net = net_of(4)
    multilevel = Multilevel(net.blocks, torch.optim.SGD(net.parameters(), 0.1), cycles=1, coarse_steps=1)
    with pytest.raises(RuntimeError, match=r"Phase\('fine'.*was not entered"):
        for _ in multilevel.schedule(2):
            pass
    phases = multilevel.schedule(2)
    first = next(phases)
    with first, pytest.raises(RuntimeError, match="leave the one before the other"):
        first.__enter__()
    with pytest.raises(RuntimeError, match="is not the next step"), first:
        pass
    next(multilevel.schedule(3))
    with pytest.raises(RuntimeError, match="another schedule"):
        next(phases)


def test_a_step_that_raised_is_offered_again():
    def train(failing):
        net = net_of(4)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        data, count = batches(100), 0
        multilevel = Multilevel(net.blocks, optimizer, cycles=1, coarse_steps=2)
        for phase in multilevel.schedule(2):
            count += 1
            try:
                with phase:
                    net.loss(data[phase.batch_index]).backward()
                    if count in failing:
                        raise KeyError(count)
                    optimizer.step()
            except KeyError:
                pass
            optimizer.zero_grad()
        return net.state_dict(), multilevel

    (plain, expected), (failed, multilevel) = train(()), train((1, 2, 4, 6, 8))
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), failed.values(), strict=True))
    assert multilevel.steps_done == expected.steps_done == 6
    assert multilevel.flops.steps == expected.flops.steps == {"fine": 2, "A": 2, "B": 2}


@pytest.mark.parametrize("failing", range(6))
def test_a_step_that_raised_is_not_taken_where_the_training_goes_on_elsewhere(failing):
    data = batches(100)

    def make():
        net = net_of(4)
        return net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)

    def train(net, optimizer, state=None, failing=None):
        """The steps that were taken, and what goes on from them."""
        multilevel = Multilevel(net.blocks, optimizer, cycles=1, coarse_steps=2)
        if state is not None:
            multilevel.load_state_dict(state)
        taken = []
        try:
            for phase in multilevel.schedule(2):
                with phase:
                    net.loss(data[phase.batch_index]).backward()
                    if len(taken) == failing:
                        raise KeyError(failing)
                    optimizer.step()
                optimizer.zero_grad()
                taken.append((phase.name, phase.batch_index))
        except KeyError:
            optimizer.zero_grad()
        return taken, multilevel.state_dict()

    uninterrupted, optimizer = make()
    expected, _ = train(uninterrupted, optimizer)
    net, optimizer = make()
    taken, state = train(net, optimizer, failing=failing)
    assert sum(state["info"]["flops"]["steps"].values()) == state["info"]["steps_done"] == len(taken) == failing
    assert taken + train(net, optimizer, state)[0] == expected
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), uninterrupted.state_dict().values(), strict=True)
    )


def test_a_layer_that_refuses_leaves_the_model_the_fine_network():
    net, other = net_of(4), net_of(4)
    multilevel = Multilevel(net.blocks, torch.optim.SGD(net.parameters(), 0.1), cycles=1, coarse_steps=1)
    schedule = multilevel.schedule(1)
    with next(schedule):
        pass
    phase = next(schedule)
    own = net.blocks[2].forward = net.blocks[2].forward
    with pytest.raises(RuntimeError, match="layer 2 has a forward of its own"), phase:
        pass
    assert [n for n, block in enumerate(net.blocks) if "forward" in block.__dict__] == [2]
    assert net.blocks[2].forward is own
    batch = batches(1)[0]
    assert torch.equal(net.loss(batch), other.loss(batch))
    del net.blocks[2].forward
    with phase:
        assert not torch.equal(net.loss(batch), other.loss(batch))
    assert torch.equal(net.loss(batch), other.loss(batch)) and multilevel.steps_done == 2


def test_hugging_face_like_loops():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block().double()

        def forward(self, hidden_states, mask=None):
            return self.block(hidden_states), None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList(Layer() for _ in range(4))

        def forward(self, x):
            for layer in self.h:
                x = layer(hidden_states=x, mask=None)[0]
            return x

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, outputs, weights = torch.randn(2, 4, dtype=torch.float64), {}, {}
    for phase in Multilevel(model.h, optimizer, cycles=1, coarse_steps=1).schedule(1):
        with phase:
            outputs[phase.name], weights[phase.name] = model(x), copy.deepcopy(model)
    b = [layer.block for layer in model.h]

    def twice(block, x):
        return x + 2 * (block(x) - x)

    torch.testing.assert_close(outputs["fine"], b[3](b[2](b[1](b[0](x)))))
    torch.testing.assert_close(outputs["A"], twice(b[3], twice(b[1], x)))
    torch.testing.assert_close(outputs["B"], twice(b[2], twice(b[0], x)))


def test_a_hugging_face_model():
    config = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=4, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0)
    config.embd_pdrop = 0.0
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tokens = torch.randint(17, (2, 8))
    multilevel = Multilevel(model.transformer.h, optimizer, model=model, cycles=1, coarse_steps=1, delta=0.0)
    for phase in multilevel.schedule(1):
        other = copy.deepcopy(model)
        with phase:
            loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        if not phase.fine:
            hooked = [block.register_forward_hook(lambda m, args, y: 2 * y - args[0]) for block in other.transformer.h]
            other.transformer.h = nn.ModuleList(other.transformer.h[n] for n in phase.layers)
            assert len(hooked) == 4
            torch.testing.assert_close(loss, other(tokens, labels=tokens, use_cache=False).loss)
    tokens_seen, width, sequence = 16 * 3, 8, 8
    dense, attention = 2 * 12 * width**2, 4 * sequence * width
    assert multilevel.flops.blocks == 3 * (4 + 2 + 2) * 16 * (dense + attention)
    assert multilevel.flops.outside == 3 * tokens_seen * 2 * width * 17


def test_layers_that_change_their_state_are_refused():
    class Wider(nn.Linear):
        def forward(self, x):
            return torch.cat([super().forward(x)] * 2, 0)

    layers = nn.Sequential(*(Wider(4, 4) for _ in range(2)))
    multilevel = Multilevel(layers, torch.optim.SGD(layers.parameters(), 0.1), cycles=1, coarse_steps=1)
    with pytest.raises(ValueError, match="layer 1 turned 3x4 float32 cpu into 6x4 float32 cpu: a coarse network needs"):
        for phase in multilevel.schedule(1):
            with phase:
                layers(torch.randn(3, 4))


def test_cycles_end_where_fine_training_pays_more():
    """Losses made up, falling along one slope in cycles and another in fine steps: the rule stops, or never does."""

    def cycles(per_coarse, per_fine):
        net = net_of(4)
        multilevel = Multilevel(net.blocks, torch.optim.SGD(net.parameters(), 0.0), cycles="auto", coarse_steps=10)
        loss, names = 10.0, []
        for phase in multilevel.schedule(300):
            with phase:
                net.loss(batches(1)[0])
                loss -= per_fine if phase.fine else per_coarse
                phase.loss(torch.tensor(loss))
            names.append(phase.name)
        return "".join("f" if n == "fine" else n for n in names)

    losing = cycles(0.001, 0.01)  # half a fine step's FLOPs
    assert losing.count("A") == 10 * 2 * 5 and losing.endswith("f" * 260)
    assert cycles(0.01, 0.001).count("A") > 900
    with pytest.raises(RuntimeError, match="say phase.loss"):
        phases(3, cycles="auto")


@pytest.mark.parametrize("skipped", [{0}, {1, 2}, {5, 9}])
def test_the_rule_for_cycles_sees_no_step_that_was_skipped(skipped, monkeypatch):
    seen, another = [], StoppingRule.another

    def watched(rule, flops, loss):
        seen.append(loss)
        return another(rule, flops, loss)

    monkeypatch.setattr(StoppingRule, "another", watched)
    net = net_of(4)
    multilevel = Multilevel(net.blocks, torch.optim.SGD(net.parameters(), 0.0), cycles="auto", coarse_steps=1)
    followed = {}
    for phase in multilevel.schedule(12):
        with phase:
            net.loss(batches(1)[0])
            phase.loss(torch.tensor(float("nan") if phase.fine_step in skipped else 10.0 - phase.fine_step))
        followed[phase.fine_step] = not phase.fine
    assert seen == [10.0 - step for step in range(12) if step not in skipped]
    assert multilevel.steps_done == 12 + 2 * sum(followed.values())
    assert not any(followed[step] for step in skipped) and any(followed.values())


def test_growing_is_one_cycle_of_a_single_small_network():
    options = {"delta": 1.0, "neighbours": "average", "single": True, "cycles": 1, "step_size": "unit"}
    for networks in (8, 4):
        compare("adamw", networks=networks, coarse_steps=5, tolerance=1e-10, **options)
    net = net_of(8)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    whole, three = Multilevel.grow(net.blocks, optimizer), Multilevel.grow(net.blocks, optimizer, layers=2, delta=0.5)
    assert whole.options == Multilevel(net.blocks, optimizer, networks=8, clock="work", **options).options
    assert (three.options.networks, three.options.delta, three.networks["A"].layers) == (4, 0.5, (3, 7))
    net.blocks = LayerParallel(net.blocks, MGRIT(levels=1), open_layers=1, close_layers=1)
    buffered = Multilevel.grow(net.blocks, torch.optim.SGD(net.parameters(), 0.05))
    assert buffered.networks["A"].layers == (6,) and buffered.options.networks == 6
    for layers in (0, 3, 8, True, 1.0):
        with pytest.raises(ValueError, match=f"layers = {layers!r}: must be a divisor of the 8 blocks"):
            Multilevel.grow(net_of(8).blocks, optimizer, layers=layers)


def test_a_cascade_trains_one_network_once():
    def train(make):
        net = net_of(4)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        multilevel, names = make(net.blocks, optimizer), []
        for phase in multilevel.schedule(3):
            with phase:
                net.loss(batches(20)[phase.batch_index]).backward()
                optimizer.step()
                optimizer.zero_grad()
            names.append(phase.name)
            if names == ["fine", "A", "A"]:
                for own, neighbour in ((1, 0), (3, 2)):
                    pairs = zip(net.blocks[own].parameters(), net.blocks[neighbour].parameters(), strict=True)
                    assert all(torch.equal(a, b) for a, b in pairs)
        assert names == ["fine", "A", "A", "fine", "fine"]
        return net.state_dict()

    written_out = {"delta": 1, "neighbours": "average", "single": True, "cycles": 1}
    preset = train(lambda *args: Multilevel.cascade(*args, coarse_steps=2))
    expected = train(lambda *args: Multilevel(*args, coarse_steps=2, **written_out))
    assert all(torch.equal(a, b) for a, b in zip(preset.values(), expected.values(), strict=True))
    net = net_of(4)
    other = Multilevel.cascade(net.blocks, torch.optim.SGD(net.parameters(), 0.05), delta=0.5)
    assert (other.options.delta, other.options.neighbours) == (0.5, "average")
