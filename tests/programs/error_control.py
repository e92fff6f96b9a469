"""Error control on real ranks: what it measures against plain autograd, what it decides, that it leaves no trace."""

import copy
import json
import logging
import sys
from pathlib import Path

import torch
from drop_in import one
from layers import Attention, Residual, copies, plain
from runner import raises, run
from torch import nn
from torch.nn import functional as F

from mlpint import MGRIT, ErrorControl, LayerParallel, gradient_bias
from mlpint.control.ladder import doubled_options, finer_options
from mlpint.errors import TrainingError

sys.path.insert(0, str(Path(__file__).parents[1]))
import reference_mgrit  # noqa: E402

LENIENT = {"target": 1e-6, "patience": 1000}  # checks that change nothing


class Training:
    """A stack, a linear head and SGD on random batches; the same on every rank."""

    def __init__(self, comm, layers, options, scale=1.0, **control):
        torch.manual_seed(1)
        self.width, self.scale = 8, scale
        mu = 1.0 if control.get("consistency") else 0.0
        self.blocks = LayerParallel(copies(layers), options, comm=comm, consistency=mu)
        self.head = nn.Linear(self.width, 3)
        self.optimizer = torch.optim.SGD([*self.blocks.parameters(), *self.head.parameters()], lr=0.05)
        self.control = ErrorControl(self.blocks, **control) if control else None
        self.count = 0

    def loss(self):
        generator = torch.Generator().manual_seed(self.count)
        x = self.scale * torch.randn(16, self.width, generator=generator)
        targets = torch.randint(3, (16,), generator=generator)
        return F.cross_entropy(self.head(self.blocks(x)), targets)

    def step(self):
        """Returns the decision, or None without control."""
        loss = self.loss()
        loss.backward()
        decision = self.control.step(loss, self.loss) if self.control else None
        if not (decision and decision.skip):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1
        return decision

    def steps(self, count):
        return [self.step() for _ in range(count)]

    def scale_layer(self, n, factor):
        if n in self.blocks.local_layers:
            with torch.no_grad():
                self.blocks.local_layers[n].outer.weight.mul_(factor)

    def go_on_from(self, other):
        """As if from a checkpoint."""
        self.blocks.load_state_dict(copy.deepcopy(other.blocks.state_dict()))
        self.head.load_state_dict(other.head.state_dict())
        self.count = other.count
        self.control.load_state_dict(json.loads(json.dumps(other.control.state_dict())))

    def history(self):
        """All that was decided and measured, to the last bit, without the times."""
        return [{k: v for k, v in d.as_dict().items() if k != "seconds"} for d in self.control.history]

    def own(self):
        """Parameters and gradients of this rank, to the last bit."""
        return {name: (p.detach().clone(), p.grad) for name, p in self.blocks.named_parameters()}


def small_layers(count=16, scale=0.1):
    torch.manual_seed(0)
    return [Residual(8, scale) for _ in range(count)]


def assert_alike(comm, value):
    """The same on every rank, to the last bit."""
    messages = comm.gather(json.dumps(value).encode())
    assert all(m == messages[0] for m in messages), messages


def cosine_and_error(ours, theirs):
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (ours, theirs))
    return float(a @ b / (a.norm() * b.norm())), float((a - b).norm() / b.norm())


def plain_gradients(layers, x, weight):
    """By autograd on the loop."""
    reference = copies(layers)
    (plain(reference, x) * weight).sum().backward()
    return [p.grad for layer in reference for p in layer.parameters()]


def textbook_gradients(layers, x, weight, options):
    _, _, grads, norms = reference_mgrit.gradients(layers, x, weight, options)
    return [g for layer in grads for g in layer], norms


def controlled_pass(comm, layers, x, options, **control):
    """One forward, backward and step of control; returns its decision."""
    blocks = LayerParallel(copies(layers), options, comm=comm)
    control = ErrorControl(blocks, **control)
    weight = torch.cos(x)
    loss = (blocks(x) * weight).sum()
    loss.backward()
    return control.step(loss, lambda: (blocks(x) * weight).sum())


def the_estimate_and_the_true_error(comm):
    torch.set_default_dtype(torch.float64)
    layers, x = [Residual(4, 0.2) for _ in range(13)], torch.randn(6, 4)
    weight, true = torch.cos(x), plain_gradients(layers, x, torch.cos(x))
    for options in (MGRIT(2, 4, 1, 1), MGRIT(2, 3, 2, 1), MGRIT(3, 2, 1, 2, "FCF"), MGRIT(2, 4, 0, 1)):
        found, _ = textbook_gradients(layers, x, weight, options)
        better, _ = textbook_gradients(layers, x, weight, finer_options(options))
        for reference, expected in (("finer", better), ("exact", true)):
            cosine, error = cosine_and_error(found, expected)
            got = controlled_pass(comm, layers, x, options, reference=reference, **LENIENT).measured
            assert abs(got.cosine - cosine) < 1e-10 and abs(got.error - error) < 1e-8, (options, reference, got)
        # Iterations that converge: the estimate is the true error but for what one more iteration leaves.
        estimate, (_, actual) = cosine_and_error(found, better), cosine_and_error(found, true)
        assert 0.5 * actual < estimate[1] < 2 * actual, (options, estimate, actual)
    torch.set_default_dtype(torch.float32)


def the_estimate_is_too_good_where_iterations_do_not_help(comm):
    """What the documentation warns of; the convergence factors tell."""
    torch.set_default_dtype(torch.float64)
    layers, x = [Residual(4, 3.0) for _ in range(24)], torch.randn(6, 4)
    options = MGRIT(2, 2, 1, 1, coarse="identity")
    estimate, true = (
        controlled_pass(comm, layers, x, options, reference=reference, **LENIENT).measured
        for reference in ("finer", "exact")
    )
    assert estimate.cosine > true.cosine + 0.2, (estimate, true)
    assert all(f > 1 for f in estimate.convergence_factor.values()), estimate
    torch.set_default_dtype(torch.float32)


def the_residual_rule(comm):
    torch.set_default_dtype(torch.float64)
    x = torch.randn(6, 4)
    for scale, options in ((0.1, MGRIT(2, 4, 1, 1)), (0.6, MGRIT(2, 4, 2, 1)), (0.6, MGRIT(2, 3, 0, 1, "FCF"))):
        layers = [Residual(4, scale) for _ in range(24)]
        _, norms = textbook_gradients(layers, x, torch.cos(x), doubled_options(options, 24))
        expected = {d: n[-1] / n[-2] for d, n in norms.items() if n}
        larger = max(expected.values())
        for target, meets in ((1.01 * larger, True), (0.99 * larger, False)):
            decision = controlled_pass(comm, layers, x, options, measure="residual", target=target)
            got = decision.measured.convergence_factor
            assert got.keys() == expected.keys(), (got, expected)
            assert all(abs(got[d] / expected[d] - 1) < 1e-5 for d in got), (got, expected)
            assert decision.action == ("hold" if meets else "climb"), decision
    torch.set_default_dtype(torch.float32)


def planted(comm, measure, **control):
    """One layer's weights are scaled up for a while in mid-training."""
    training = Training(comm, small_layers(), MGRIT(2, 4, 1, 1), every=4, measure=measure, margin=0.1, **control)
    for _ in range(40):
        if training.count == 10:
            training.scale_layer(6, 100)
        if training.count == 21:
            training.scale_layer(6, 1 / 100)
        training.step()
    return training


def a_planted_deterioration(comm):
    for measure, target in (("gradient", 0.95), ("residual", 0.135)):
        training = planted(comm, measure, target=target)
        history = training.control.history
        assert [d.step for d in history] == list(range(1, 40, 4))
        floor = training.control.ladder[0]
        changes = [(d.step, d.action) for d in history if d.action != "hold"]
        assert changes[0][1] == "climb" and 10 < changes[0][0] <= 16, changes  # within two checks
        assert changes[-1][1] == "descend" and changes[-1][0] > 21 and history[-1].after == floor, changes
        climb = next(d for d in history if d.action == "climb")
        last = climb.tried[-1]
        assert last.options == climb.after != climb.before == floor
        good = last.cosine >= target if measure == "gradient" else last.largest_factor <= target
        assert good, climb
        assert_alike(comm, training.history())
        assert training.history() == planted(one(), measure, target=target).history()
        assert 0 < training.control.share < 1


def checks_come_sooner_at_first(comm):
    training = Training(comm, small_layers(4), MGRIT(2, 2, 1, 1), every=16)
    training.steps(40)
    assert [d.step for d in training.control.history] == [1, 3, 5, 9, 17, 33]


def a_cheaper_rung_that_does_not_last_is_tried_later(comm):
    """A layer goes bad, recovers, and goes bad again as soon as the cheap rung is back."""
    training = Training(comm, small_layers(), MGRIT(2, 4, 1, 1), every=1, margin=0.1, patience=1)
    floor, waited = training.control.ladder[0], []
    for _ in range(4):
        training.scale_layer(6, 100)
        training.step()
        assert training.control.history[-1].action == "climb", training.control.history[-1]
        training.scale_layer(6, 1 / 100)
        start = training.count
        while training.blocks.options != floor:
            training.step()
        waited.append(training.count - start)
    assert waited == [1, 2, 4, 8], waited
    assert [d.action for d in training.steps(12)] == ["hold"] * 12
    training.scale_layer(6, 100)
    training.step()
    training.scale_layer(6, 1 / 100)
    assert [d.action for d in training.steps(1)] == ["descend"]  # the last one had lasted
    assert_alike(comm, training.history())


def where_it_climbs_the_gradient_is_right(comm):
    """Against autograd, on the batch it was decided on."""
    torch.set_default_dtype(torch.float64)
    layers, x = small_layers(scale=0.4), torch.randn(16, 8)
    weight = torch.cos(x)
    decision = controlled_pass(comm, layers, x, MGRIT(2, 4, 1, 1), target=0.999, max_error=0.02)
    assert decision.action == "climb"
    true = plain_gradients(layers, x, weight)
    for m in (decision.measured, *decision.tried):
        cosine, error = cosine_and_error(textbook_gradients(layers, x, weight, m.options)[0], true)
        assert abs(m.cosine - cosine) < 1e-9 and abs(m.error - error) < 1e-8, (m, cosine, error)
        assert (cosine >= 0.999 and error <= 0.02) == (m.options == decision.after), (m, cosine, error)
    torch.set_default_dtype(torch.float32)


class Dropping(nn.Module):
    """Dropout before the stack and in it, whose passes are counted, and some passes a loss."""

    def __init__(self, comm, layers, options, passes, outer):
        super().__init__()
        self.blocks, self.passes, self.outer = LayerParallel(copies(layers), options, comm=comm), passes, outer
        self.edge = nn.Linear(8, 8)

    def forward(self, x):
        x = F.dropout(self.edge(x), self.outer)
        return sum(self.blocks(x).square().mean() for _ in range(self.passes)) / 2


def everything_of_a_training(comm, layers, coarse, passes, outer, controlled):
    """Two microbatches a step. Losses, gradients, random numbers; and how often gradient hooks ran."""
    torch.manual_seed(1)
    model = Dropping(comm, layers, MGRIT(2, 4, 1, 1, coarse=coarse), passes, outer)
    control = ErrorControl(model.blocks, every=1, **LENIENT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    calls, record = [], []
    for p in model.blocks.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    for step in range(4):
        for microbatch in range(2):
            x = torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(2 * step + microbatch))
            loss = model(x)
            loss.backward()
        gradients, stats = [p.grad for p in model.parameters()], model.blocks.stats
        copied = [g.clone() for g in gradients]
        if controlled:
            check(model, control, loss, x, exact_repetition=not outer)
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert all(torch.equal(g, c) for g, c in zip(gradients, copied, strict=True))
        assert model.blocks.stats is stats
        record += [loss.detach(), *copied, torch.get_rng_state(), torch.rand(3)]
        optimizer.step()
        optimizer.zero_grad()
    return record, len(calls)


def check(model, control, loss, x, exact_repetition):
    first = control.steps == 0
    losses = []

    def again():
        found = model(x)
        losses.append(float(found.detach()))
        return found

    decision = control.step(loss, again)
    assert decision.action == "hold", decision
    if exact_repetition:
        # The same random numbers give the same loss; how many passes a loss takes is known after the first.
        assert losses[1 if first and model.passes > 1 else 0] == float(loss.detach()), losses


def checks_leave_no_trace(comm):
    """Training with a check on every step is, bit for bit, training without."""
    layers = [Attention(dropout=0.2) for _ in range(8)]
    with torch.no_grad():
        for layer in layers:  # so near to the identity that no operator fails altogether
            layer.down.weight *= 0.3
            layer.attention.out_proj.weight *= 0.3
    for coarse, passes, outer in (("fitted", 1, 0.1), ("injection", 2, 0.0), ("sum", 1, 0.0)):
        expected, count = everything_of_a_training(comm, layers, coarse, passes, outer, controlled=False)
        got, controlled_count = everything_of_a_training(comm, layers, coarse, passes, outer, controlled=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), coarse
        assert count == controlled_count


def a_check_is_cheap(comm):
    """At most 2% of the layer evaluations of 200 steps, on every rung of the default ladder but the exact one, whose
    check takes less than two steps."""
    blocks = LayerParallel(small_layers(32, 0.05), MGRIT(2, 4, 1, 1), comm=comm)
    control = ErrorControl(blocks, target=0.5, patience=100)
    assert control.every == 200
    x = torch.randn(16, 8)
    passes = []

    def work():
        return sum(s.total(k) for s in passes for k in ("forward", "input_vjp")) + sum(
            2 * s.total("combined_vjp") for s in passes
        )

    blocks.register_forward_hook(lambda *_: passes.append(blocks.stats))
    for rung in control.ladder:
        blocks.options, control.steps = rung, 0
        loss = blocks(x).square().mean()
        loss.backward()
        step = work()
        passes.clear()
        decision = control.step(loss, lambda: blocks(x).square().mean())
        assert decision.action == "hold", decision
        assert work() < 0.02 * 200 * step, (rung, work(), step)
        passes.clear()


def bad_numbers_are_skipped_together(comm):
    """A loss that is not finite, and a gradient that is not on one rank alone."""
    training = Training(comm, small_layers(), MGRIT(2, 4, 1, 1), every=100)
    training.step()
    before = training.own()
    training.scale = float("inf")
    decision = training.step()
    assert decision.skip and decision.action == "skip" and training.control.skipped == 1
    training.scale = 1.0
    handles = [
        p.register_hook(lambda g: g * float("nan"))
        for n, layer in training.blocks.local_layers.items()
        if n == 15
        for p in layer.parameters()
    ]
    decision = training.step()
    assert decision.skip and training.control.skipped == 2, "one rank's gradient"
    assert all(torch.equal(p, before[name][0]) for name, p in training.blocks.named_parameters())
    for handle in handles:
        handle.remove()
    assert not training.step().skip
    assert not all(torch.equal(p, before[name][0]) for name, p in training.blocks.named_parameters())
    assert_alike(comm, training.history())


def too_many_bad_steps_name_the_layer(comm):
    def message(break_it):
        training = Training(comm, small_layers(), MGRIT(2, 4, 1, 1), every=100, skip_limit=3)
        training.step()
        break_it(training)
        decisions = [training.step(), training.step()]
        assert all(d.skip for d in decisions)
        try:
            training.step()
        except RuntimeError as error:
            assert isinstance(error, TrainingError) and training.control.skipped == 3
            assert_alike(comm, str(error))
            return str(error)
        raise AssertionError("no error")

    rank = LayerParallel(small_layers(), MGRIT(2, 4, 1, 1), comm=comm).rank_of(9)

    def overflow(training):
        training.scale_layer(9, float("inf"))

    text = message(overflow)
    # At (1,1) the last interval's states, and so the loss, come from before layer 9: it is the gradient that tells.
    assert text.startswith("3 steps in a row were not finite, the last one's loss was "), text
    assert text.endswith(
        f"the state after layer 9 (Residual, rank {rank}) is not finite, and neither are its weights; "
        "lower the learning rate, or look at the data of this step"
    )

    def input_overflow(training):
        training.scale = float("nan")

    assert "the state before layer 0 (Residual, rank 0) is not finite" in message(input_overflow)

    def head_overflow(training):
        with torch.no_grad():
            training.head.weight.mul_(float("inf"))

    assert "the states of all layers are finite, the loss is not" in message(head_overflow)

    def gradient_overflow(training):
        for n, layer in training.blocks.local_layers.items():
            if n == 9:
                layer.inner.weight.register_hook(lambda g: g / 0)

    assert f"the gradient of layer 9 (rank {rank}) is not" in message(gradient_overflow)


class Excursion(nn.Module):
    """Harmless layer by layer, but a large step where the first layer of an interval is stretched over it."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.weight = shift, nn.Parameter(torch.tensor(0.01))

    def forward(self, x):
        return x + self.shift if self.shift else x + self.weight * torch.sinh(x)


def a_solver_that_overflows_is_left_at_once(comm):
    layers = [Excursion(shift) for _ in range(4) for shift in (3000.0, -1500.0, -1500.0, 0.0)]
    training = Training(comm, layers, MGRIT(2, 4, 1, 1), every=100)
    first, second = training.steps(2)
    assert first.skip and first.action == "climb" and first.before == MGRIT(2, 4, 1, 1), first
    assert first.tried[-1].options == first.after and first.tried[-1].cosine >= 0.95
    assert first.tried[0].cosine != first.tried[0].cosine, "(2,1) overflows too"
    assert not second.skip and second.before == first.after
    json.dumps(training.history(), allow_nan=False)


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))


def a_target_that_cannot_be_met(comm):
    ladder = [MGRIT(2, 4, 1, 1), MGRIT(2, 4, 2, 1), MGRIT(2, 4, 1, 2)]
    handler, logger = Lines(), logging.getLogger("mlpint")
    logger.addHandler(handler)
    try:
        training = Training(comm, small_layers(scale=0.4), ladder[0], every=1, target=0.99999, ladder=ladder)
        decisions = training.steps(14)
    finally:
        logger.removeHandler(handler)
    first = decisions[0]
    best = max((first.measured, *first.tried), key=lambda m: m.cosine)
    assert len(first.tried) == 2 and first.after == best.options and "as do all rungs" in first.reason
    # Only every so often is the whole ladder tried again.
    assert [len(d.tried) for d in decisions[1:11]] == [0] * 10 and len(decisions[11].tried) > 0
    told = [line for level, line in handler.lines if level == "WARNING"]
    assert len(told) == (comm.rank == 0), told
    assert not told or told[0].startswith("no rung of the ladder meets cosine 0.99999; the best, (2,1) cf 4"), told


def a_ladder_of_operators(comm):
    """An operator that was never in use learns before it is measured; cfactor may change too."""
    ladder = [
        MGRIT(2, 4, 1, 1),
        MGRIT(2, 4, 1, 1, coarse="fitted"),
        MGRIT(2, 2, 2, 1),
        MGRIT(2, 4, 1, 1, coarse="sum"),
        MGRIT(1),
    ]

    def trained(c):
        training = Training(c, small_layers(scale=0.3), ladder[0], every=1, target=0.9, ladder=ladder)
        training.step()
        training.control.target = 0.9999999
        training.step()
        return training

    training = trained(comm)
    tried = {m.options: m.cosine for d in training.control.history for m in d.tried}
    assert set(ladder[1:]) <= set(tried), tried
    assert tried[ladder[1]] != training.control.history[0].measured.cosine
    assert training.blocks.options == ladder[-1]
    training.control.target = 0.9
    for _ in range(2):
        decision = training.step()
    assert decision.action == "descend" and decision.after != ladder[-1], decision
    assert_alike(comm, training.history())
    assert training.history()[:2] == trained(one()).history()


def resuming(comm):
    def new():
        return Training(comm, small_layers(), MGRIT(2, 4, 1, 1), every=3, target=0.98)

    whole, first, second = new(), new(), new()
    for training in (whole, first):
        training.scale_layer(6, 60)
    whole.steps(20)
    first.steps(8)
    assert first.blocks.options != MGRIT(2, 4, 1, 1)
    second.go_on_from(first)
    assert second.blocks.options == first.blocks.options
    second.steps(12)
    assert first.history() + second.history() == whole.history()
    for damage, text in (
        ({"steps": None}, "the state lacks steps"),
        ({"options": MGRIT(2, 7).__dict__}, "are no rung of the ladder"),
    ):
        state = first.control.state_dict() | damage
        state = {k: v for k, v in state.items() if k not in damage or v is not None}
        try:
            second.control.load_state_dict(state)
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"no error: {text}")


def the_consistency_term_is_the_first_lever(comm):
    """Raised where gradients are a little off, lowered where they are right; alike on all ranks, and once resumed."""
    rough, fine = small_layers(16, 0.3), small_layers(16, 0.02)
    control = {"consistency": "auto", "patience": 1}
    options = MGRIT(2, 4, 1, 1)

    off = Training(comm, rough, options, consistency="auto", every=1, reference="exact", **LENIENT)
    cosine = off.step().measured.cosine
    off.control.target = 1 - (1 - cosine) / 2  # missed by little
    decision = off.step()
    assert decision.action == "raise" and decision.after == options and decision.consistency == (1.0, 3.0), decision
    assert off.blocks.consistency == off.control.consistency == 3 and "mu 1 -> 3" in str(decision)
    control |= {"every": 4}

    right = Training(comm, fine, options, **control, target=0.5)
    right.steps(20)
    assert [d.action for d in right.control.history].count("lower") == 4 and right.blocks.consistency == 0, (
        right.history()
    )
    alone = Training(one(), fine, options, **control, target=0.5)
    alone.steps(20)
    assert alone.history() == right.history()
    assert_alike(comm, off.history() + right.history())

    cut, rest = (Training(comm, fine, options, **control, target=0.5) for _ in range(2))
    cut.steps(7)
    rest.go_on_from(cut)
    assert rest.blocks.consistency == cut.blocks.consistency < 1
    rest.steps(13)
    assert cut.history() + rest.history() == right.history()


def tied_frozen_and_idle(comm):
    """Each parameter counts once; ranks without layers take part."""
    shared = Residual(8)
    layers = [shared, Residual(8), shared]
    layers[1].inner.weight.requires_grad_(False)

    def trained(c):
        training = Training(c, layers, MGRIT(2, 2, 1, 1), every=1, **LENIENT)
        training.steps(2)
        return training.history()

    history = trained(comm)
    assert history == trained(one())
    assert 0 < history[0]["measured"]["error"] < 1


def the_cyclic_layout(comm):
    """Layers of one interval on several ranks; the same numbers but for rounding as on one."""
    options = MGRIT(2, max(2, comm.size), 1, 1, coarse="sum")
    histories = []
    for c in (comm, one()):
        blocks = LayerParallel(small_layers(12, 0.3), options, comm=c, layout="cyclic")
        control, x = ErrorControl(blocks, every=1, target=0.99999), torch.linspace(-1, 1, 128).view(16, 8)
        for _ in range(3):
            loss = blocks(x).square().mean()
            loss.backward()
            control.step(loss, lambda blocks=blocks, x=x: blocks(x).square().mean())
        histories.append(control.history)
    ours, theirs = histories
    assert [(d.action, d.after) for d in ours] == [(d.action, d.after) for d in theirs]
    assert ours[0].action == "climb"
    assert all(abs(a.measured.error - b.measured.error) < 1e-4 for a, b in zip(ours, theirs, strict=True))


def the_bias_and_the_noise_of_gradients(comm):
    """Against means and variances of gradients taken one by one, the exact ones by autograd; it leaves no trace."""
    torch.set_default_dtype(torch.float64)
    layers = [Residual(6) for _ in range(8)]
    stack, reference = LayerParallel(copies(layers), MGRIT(2, 4, 1, 1), comm=comm, consistency=0.5), copies(layers)
    batches = [torch.randn(5, 6) for _ in range(7)]

    def loss(network, x):
        return network(x).pow(3).sum()

    measured = gradient_bias(stack, [lambda x=x: loss(stack, x) for x in batches])
    assert all(p.grad is None for p in stack.parameters()) and stack.consistency == 0.5
    stack.consistency = 0
    inexact, exact = [], []
    for x in batches:
        stack.zero_grad()
        loss(stack, x).backward()
        nn.ModuleList(reference).zero_grad()
        loss(lambda x: plain(reference, x), x).backward()
        inexact.append(torch.cat([torch.zeros(1), *(p.grad.flatten() for p in stack.parameters())]))
        theirs = [p.grad.flatten() for n in stack.local_layers for p in reference[n].parameters()]
        exact.append(torch.cat([torch.zeros(1), *theirs]))
    a, b = torch.stack(inexact), torch.stack(exact)
    d, n = a - b, len(batches)
    sums = torch.stack([d.mean(0).square().sum(), b.mean(0).square().sum(), d.var(0).sum() / n, b.var(0).sum() / n])
    sums = torch.cat([sums, torch.stack([a.mean(0).square().sum(), (a.mean(0) * b.mean(0)).sum()])])
    comm.sum_ordered([sums])
    bias, size, resolution, noise, own = (float(v) for v in sums[:5].sqrt())
    expected = (n, bias / size, resolution / size, noise / size, float(sums[5]) / own / size)
    got = (measured.batches, measured.bias, measured.resolution, measured.noise, measured.cosine)
    assert all(abs(x - y) < 1e-9 for x, y in zip(got, expected, strict=True)), (got, expected)
    for options, batches, text in ((MGRIT(levels=1), 3, "exact"), (MGRIT(2, 4, 1, 1), 1, "at least 2")):
        stack.options = options
        losses = [lambda: loss(stack, torch.ones(5, 6))] * batches
        raises(ValueError, text, lambda losses=losses: gradient_bias(stack, losses))
    torch.set_default_dtype(torch.float32)


def ranks_that_disagree(comm):
    blocks = LayerParallel(small_layers(), MGRIT(2, 4, 1, 1), comm=comm)
    try:
        ErrorControl(blocks, every=100 + comm.rank)
    except ValueError as error:
        assert "the ranks disagree on ErrorControl: every is 100 on rank 0, 101 on rank 1" in str(error)
    else:
        assert comm.size == 1


if __name__ == "__main__":
    run(
        [
            the_estimate_and_the_true_error,
            the_estimate_is_too_good_where_iterations_do_not_help,
            the_residual_rule,
            a_planted_deterioration,
            checks_come_sooner_at_first,
            a_cheaper_rung_that_does_not_last_is_tried_later,
            where_it_climbs_the_gradient_is_right,
            checks_leave_no_trace,
            a_check_is_cheap,
            bad_numbers_are_skipped_together,
            too_many_bad_steps_name_the_layer,
            a_solver_that_overflows_is_left_at_once,
            a_target_that_cannot_be_met,
            a_ladder_of_operators,
            resuming,
            the_consistency_term_is_the_first_lever,
            tied_frozen_and_idle,
            the_cyclic_layout,
            the_bias_and_the_noise_of_gradients,
            ranks_that_disagree,
        ]
    )
