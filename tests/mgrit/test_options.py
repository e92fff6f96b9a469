"""Bad options and bad stacks: one clear error each."""

import dataclasses

import pytest
import torch
from torch import nn

from mlpint import MGRIT, LayerParallel, clip_grad_norm_


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("levels", 0, "integer of at least 1"),
        ("levels", 2.0, "integer of at least 1"),
        ("cfactor", 1, "integer of at least 2"),
        ("cfactor", True, "integer of at least 2"),
        ("forward_iters", -1, "integer of at least 0"),
        ("backward_iters", "1", "integer of at least 0"),
        ("relaxation", "CF", "one of F, FCF"),
        ("coarse", "magic", "one of injection, scaled, fitted, sum, identity"),
        ("tolerance", -1e-3, "number in"),
        ("tolerance", 1, "number in"),
        ("tolerance", float("nan"), "number in"),
    ],
)
def test_options_out_of_range(field, value, allowed):
    with pytest.raises(ValueError, match=f"MGRIT.{field} = {value!r}.*{allowed}"):
        MGRIT(**{field: value})


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MGRIT().levels = 3


LAYERS = [nn.Linear(3, 3) for _ in range(4)]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([],), ValueError, "no layers"),
        (([nn.Linear(3, 3), "relu"],), TypeError, "layer 1 is a str"),
        ((LAYERS, {"levels": 2}), TypeError, "must be an mlpint.MGRIT, got dict"),
        ((LAYERS, MGRIT(), dict(open_layers=-1)), ValueError, "open_layers = -1"),
        ((LAYERS, MGRIT(), dict(open_layers=2, close_layers=2)), ValueError, "2 \\+ 2 leaves none of the 4 layers"),
        ((LAYERS, MGRIT(), dict(step_size=0.0)), ValueError, "step_size = 0.0: must be a positive number"),
        ((LAYERS, MGRIT(), dict(layout="diagonal")), ValueError, "layout = 'diagonal'"),
        ((LAYERS, MGRIT(), dict(serial_microbatches=0)), ValueError, "serial_microbatches = 0"),
        ((LAYERS, MGRIT(), dict(comm="world")), TypeError, "comm must be"),
    ],
)
def test_bad_stacks(arguments, error, text):
    layers, *rest = arguments
    keywords = rest.pop() if len(rest) == 2 else {}
    with pytest.raises(error, match=text):
        LayerParallel(layers, *rest, **keywords)


def test_options_replaced_by_something_else():
    stack = LayerParallel(LAYERS)
    with pytest.raises(TypeError, match="must be an mlpint.MGRIT"):
        stack.options = 3


def test_bad_states_and_norms():
    stack = LayerParallel(LAYERS)
    with pytest.raises(TypeError, match="a tensor or a tuple of tensors"):
        stack([1.0, 2.0])
    with pytest.raises(ValueError, match="max_norm = 0: must be positive"):
        clip_grad_norm_(stack, 0)
    assert isinstance(stack(torch.randn(2, 3)), torch.Tensor)


def test_the_cyclic_layout_refuses_operators_after_exact_sweeps_too():
    stack = LayerParallel(LAYERS, MGRIT(2, 4, 0, 0), layout="cyclic", recompute=True)
    stack(torch.randn(2, 3))
    stack.options = MGRIT(2, 4, 1, 1)
    with pytest.raises(ValueError, match="layout='cyclic' is for"):
        stack(torch.randn(2, 3))
