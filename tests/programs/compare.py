"""A model that parallelize() has changed against a copy that it has not: outputs, gradients and state dict."""

import copy
import json

import torch
from layers import assert_close

from mlpint import MGRIT
from mlpint.hf import parallelize
from mlpint.nn import BlockStack
from mlpint.parallel.clip import stacks_of

TOLERANCE = 1e-10


def float64(scenario):
    """Scenarios that compare to rounding run in double precision."""

    def run(comm):
        torch.set_default_dtype(torch.float64)
        try:
            scenario(comm)
        finally:
            torch.set_default_dtype(torch.float32)

    run.__name__ = scenario.__name__
    return run


def converged(layers, cfactor=2):
    """Options with which MGRIT is exact for so many layers."""
    k = -(-layers // cfactor)
    return MGRIT(cfactor=cfactor, forward_iters=k, backward_iters=k)


def disturb(model, comm):
    """Other values on all ranks but the first, everywhere but in the stacks: parallelize has to make them equal."""
    stacks = ("blocks.", "layers.", "layer.", "h.", "encoder.", "decoder.")
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if comm.rank and t.is_floating_point() and not any(f".{s}" in f".{name}" for s in stacks):
                t += comm.rank


def named_gradients(model):
    """Gradients (None where there are none) by the parameters' names where no layers are stacked."""
    stacks = {f"{name}.": m for name, m in model.named_modules() if isinstance(m, BlockStack)}
    for name, p in model.named_parameters():
        if not name.startswith(tuple(stacks)):
            yield name, p.grad
    for name, stack in stacks.items():
        for i, n in enumerate(stack.indices):
            for piece in stack.pieces:
                grad = getattr(stack, piece.field).grad
                yield name.replace("stacked.", f"{n}.") + piece.name, None if grad is None else piece.view(grad[i])


def names_everywhere(comm, model):
    """Names of the parameters that some rank holds."""
    own = json.dumps([name for name, _ in named_gradients(model)]).encode()
    return {name for message in comm.gather(own) for name in json.loads(message)}


def compare(comm, model, call, *, options=None, layers=None, tolerance=TOLERANCE, **kwargs):
    """Calls both models, compares all results, their gradients and the state dicts; returns the changed model.

    call: returns tensors by name, of which "loss" is differentiated, or else the sum of the cubes of all (that of their
        squares would be fixed by a last LayerNorm).
    layers: of the stack; where no options are given, exact ones and MGRIT that has converged are tried.
    """
    for o in options or [MGRIT(levels=1), converged(layers)]:
        reference, changed = copy.deepcopy(model), copy.deepcopy(model)
        disturb(changed, comm)
        assert parallelize(changed, o, comm=comm, **kwargs) is changed
        assert {stack.options for _, stack in stacks_of(changed)} == {o}
        check(comm, reference, changed, call, f"with {o}", tolerance)
        _compare_states(reference, changed)
    return changed


def check(comm, reference, changed, call, what="", tolerance=TOLERANCE):
    """Calls both models and compares all results and their gradients."""
    results = []
    for model in (reference, changed):
        torch.manual_seed(3)
        result = call(model)
        if torch.is_grad_enabled():
            result.get("loss", sum((t**3).sum() for t in result.values())).backward()
        results.append(result)
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, tolerance, f"{name} {what}")
    _compare_gradients(comm, reference, changed, tolerance)


def _compare_gradients(comm, reference, changed, tolerance):
    assert names_everywhere(comm, changed) == {name for name, _ in reference.named_parameters()}
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    largest = max((g.abs().max() for g in gradients.values()), default=0)
    for name, gradient in named_gradients(changed):
        if name in gradients:
            # Gradients that are zero but for rounding (of the keys' biases) are measured by the others.
            scale = max(gradients[name].abs().max(), 1e-4 * largest)
            error = (gradient - gradients[name]).abs().max()
            assert error <= tolerance * scale, f"gradient of {name}: {error:.3g} over {tolerance} of {scale:.3g}"
        else:
            assert gradient is None or not gradient.any(), name


def _compare_states(reference, changed):
    state = changed.state_dict()
    expected = reference.state_dict()
    assert list(state) == list(expected)
    other = copy.deepcopy(reference)
    with torch.no_grad():
        for t in other.parameters():
            t.zero_()
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]), name
    changed.load_state_dict(expected)
