"""Error control measures what it says, decides alike on all ranks, leaves no trace; see programs/error_control.py."""

import pytest
import torch
from torch import nn

from mlpint import MGRIT, ErrorControl, LayerParallel
from scenarios import check, names


@pytest.mark.parametrize("scenario", names("error_control.py"))
@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), ("mpich", 2)])
def test_error_control(scenario, launcher, ranks):
    check("error_control.py", scenario, launcher, ranks)


def blocks(options=None, layers=16):
    return LayerParallel([nn.Linear(4, 4) for _ in range(layers)], options or MGRIT(2, 4, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": "loss"}, "measure = 'loss': must be gradient or residual"),
        ({"reference": "serial"}, "reference = 'serial': must be finer or exact"),
        ({"target": 1}, r"target = 1: must be in \(0, 1\), a cosine"),
        ({"target": float("nan")}, "target = nan: must be"),
        ({"target": True}, "target = True: must be"),
        ({"measure": "residual", "target": 0}, "target = 0: must be positive, a convergence factor"),
        ({"measure": "residual", "max_error": 0.1}, "measure = 'residual': must be gradient where max_error"),
        ({"measure": "residual", "reference": "exact"}, "measure = 'residual': must be gradient where"),
        ({"max_error": -1.0}, "max_error = -1.0: must be positive"),
        ({"every": 0}, "every = 0: must be an integer of at least 1"),
        ({"every": 2.5}, "every = 2.5: must be an integer of at least 1"),
        ({"start": -1}, "start = -1: must be an integer of at least 0"),
        ({"patience": 0}, "patience = 0: must be an integer of at least 1"),
        ({"skip_limit": 0}, "skip_limit = 0: must be an integer of at least 1"),
        ({"margin": 1.0}, r"margin = 1.0: must be in \[0, 1\)"),
        ({"ladder": [MGRIT(2, 4, 1, 1)]}, "the ladder has 1 rungs: must be at least 2, all different"),
        ({"ladder": [MGRIT(2, 4, 1, 1)] * 2}, "must be at least 2, all different"),
        ({"ladder": [MGRIT(2, 4, 2, 1), MGRIT(1)]}, "the stack's options, MGRIT.*, are no rung of the ladder"),
    ],
)
def test_values_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ErrorControl(blocks(), **arguments)


@pytest.mark.parametrize("size", [0.01, 3.0])
def test_the_first_check_comes_after_the_start_and_tells_of_a_model_that_makes_it_poor(size, caplog):
    """Layers that turn the state over are told of once, with what helps; others are not."""
    stack = blocks(MGRIT(2, 4, 1, 1), layers=16)
    with torch.no_grad():
        for layer in stack.local_layers.values():
            layer.weight.copy_(torch.eye(4) + size * torch.randn(4, 4) / 4)
    control, x = ErrorControl(stack, every=8, start=3), torch.randn(5, 4)
    for _ in range(18):
        loss = stack(x).square().mean().log()
        loss.backward()
        control.step(loss, lambda: stack(x).square().mean().log())
    assert [decision.step for decision in control.history] == [4, 5, 9, 17]
    told = [r.getMessage() for r in caplog.records if "first check finds poor gradients" in r.getMessage()]
    assert len(told) == (size > 1) and all("Pre-LN" in line for line in told)


def test_types_refused():
    with pytest.raises(TypeError, match="blocks must be an mlpint.LayerParallel, got Linear"):
        ErrorControl(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="the ladder holds a str, not only mlpint.MGRIT"):
        ErrorControl(blocks(), ladder=[MGRIT(2, 4, 1, 1), "exact"])


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match="the stack is exact; give a ladder"):
        ErrorControl(blocks(MGRIT(1)))


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        ErrorControl(blocks().requires_grad_(False))


def test_a_rung_that_the_layout_does_not_allow():
    stack = LayerParallel([nn.Linear(4, 4) for _ in range(16)], MGRIT(2, 4, 1, 1, coarse="sum"), layout="cyclic")
    with pytest.raises(ValueError, match="rung MGRIT.*injection.* of the ladder: layout='cyclic' is for"):
        ErrorControl(stack, ladder=[stack.options, MGRIT(2, 4, 1, 1)])
    assert stack.options == MGRIT(2, 4, 1, 1, coarse="sum")
    assert len(ErrorControl(stack).ladder) == 7


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"consistency = \[1.0\]: must be at least 2 weights, ascending"),
        ([1.0, 0.1], r"consistency = \[1.0, 0.1\]: must be at least 2 weights, ascending"),
        ([0.0, 0.5], r"the stack's consistency, 1, is not among \[0.0, 0.5\]"),
        ([-1.0, 1.0], "consistency = -1.0: must be a number of at least 0"),
        ([1.0, float("nan")], "consistency = nan: must be a number of at least 0"),
    ],
)
def test_weights_refused(weights, message):
    stack = LayerParallel([nn.Linear(4, 4) for _ in range(16)], MGRIT(2, 4, 1, 1), consistency=1.0)
    with pytest.raises(ValueError, match=message):
        ErrorControl(stack, consistency=weights)


def test_weights_need_a_term():
    with pytest.raises(ValueError, match="consistency = 'auto': the stack has no consistency term to begin with"):
        ErrorControl(blocks(), consistency="auto")
    with pytest.raises(ValueError, match="consistency with rung MGRIT.*sum.* of the ladder"):
        ErrorControl(blocks(MGRIT(2, 4, 1, 1, coarse="sum")), consistency=[0.0, 1.0])


def test_calls_refused():
    stack = blocks()
    control = ErrorControl(stack, every=1)
    with pytest.raises(TypeError, match="again must be a function that computes the loss, got float"):
        control.step(1.0, 1.0)
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="the stack has not been called yet"):
        control.step(1.0, lambda: stack(x).sum())
    loss = stack(x).sum()
    loss.backward()
    with pytest.raises(ValueError, match="`again` did not call the stack"):
        control.step(loss, lambda: torch.ones((), requires_grad=True) * 2)
    for again, text in (
        (lambda: float(stack(x).detach().sum()), "`again` returned float"),
        (lambda: stack(x), r"`again` returned a tensor of shape \(2, 4\)"),
        (lambda: stack(x).sum().detach(), "`again` returned a loss that nothing can be differentiated by"),
        (lambda: stack(x).sum().backward(), "`again` returned NoneType"),
    ):
        with pytest.raises(TypeError, match=text):
            control.step(loss, again)
        stack.zero_grad()
    assert stack.options == control.ladder[0] and stack.conditions.learning and stack.conditions.keys is None
    stack.options = MGRIT(2, 3)
    with pytest.raises(ValueError, match="are no rung of the ladder; set one of control.ladder"):
        control.step(loss, lambda: stack(x).sum())
