"""Conformance tests for users' blocks, after XBraid's braid_Test functions."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..layers.batch_slices import mixes_samples
from ..layers.layer_output import output_tensors
from ..layers.random_keys import LayerRandom


def check_block(block: nn.Module, x: torch.Tensor | tuple[torch.Tensor, ...], *args: Any, **kwargs: Any) -> None:
    """Checks that a module can be a layer of :class:`mlpint.LayerParallel`.

    It must keep the shape and dtype of its state, leave its input unchanged, give the same output and gradients when it
    is evaluated again at the same input under the same dropout key, keep no memory of earlier evaluations, be
    differentiable in its input, and have gradients that agree with finite differences. It warns of a block that mixes
    the samples of a batch, which ``chain_slices`` and ``serial_microbatches`` are not for.

    Args:
        block: the module, in the mode (train or eval) it will be used in; it is left as it was.
        x: an example state; a tensor or a tuple of tensors.
        *args, **kwargs: what the stack will be called with beside the state.

    Raises:
        ValueError: naming what is not met and what to do about it.
    """
    name = type(block).__name__
    single = isinstance(x, torch.Tensor)
    state = tuple(t.detach() for t in ((x,) if isinstance(x, torch.Tensor) else x))
    random = LayerRandom(0)
    before = {k: v.clone() for k, v in block.state_dict().items()}

    def evaluate(inputs: tuple[torch.Tensor, ...], step: int = 0) -> tuple[torch.Tensor, ...]:
        with random.keyed(step, 0, 0, block.training, state[0].device):
            return output_tensors(0, block(inputs[0] if single else inputs, *args, **kwargs), inputs, single)

    with random.preserved(state[0].device):
        try:
            _check_replay(name, evaluate, state)
            changed = [k for k, v in block.state_dict().items() if not torch.equal(v, before[k])]
            if changed:
                raise ValueError(
                    f"{name} changes its own {changed[0]!r} when it is evaluated; a layer is evaluated several times a "
                    "step (batch norm in training mode and the like cannot be used)"
                )
            _check_gradients(name, evaluate, state)
            _look_at_samples(name, evaluate, state)
        finally:
            block.load_state_dict(before)


def _check_replay(name, evaluate, state) -> None:
    unchanged = [t.clone() for t in state]
    with torch.no_grad():
        first = evaluate(state)
        if any(not torch.equal(a, b) for a, b in zip(state, unchanged, strict=True)):
            raise ValueError(f"{name} changes its input in place; the solver keeps inputs for later evaluations")
        other = tuple(t + 0.1 * t.abs().mean() if t.is_floating_point() else t for t in state)
        evaluate(other, step=1)
        again = evaluate(state)
    if any(not torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        raise ValueError(
            f"{name} is not replayable: evaluated twice at the same input under the same dropout key it gives other "
            "outputs. Draw random numbers from torch's default generators only, and keep no state between evaluations"
        )


def _look_at_samples(name, evaluate, state) -> None:
    if not all(t.dim() and len(t) == len(state[0]) > 1 for t in state):
        return
    with torch.no_grad():
        mixed = mixes_samples(evaluate, state)
    if mixed:
        warnings.warn(
            f"{name} mixes the samples of a batch (the first dimension): what it makes of one depends on the others. "
            "Leave chain_slices and serial_microbatches at 1, which cut the batch",
            stacklevel=3,
        )


def _check_gradients(name, evaluate, state) -> None:
    leaves = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in state)
    with torch.enable_grad():
        outputs = evaluate(leaves)
    floating = [t for t in leaves if t.is_floating_point()]
    pairs = [(o, torch.randn_like(o)) for o in outputs if o.is_floating_point() and o.requires_grad]
    if not pairs:
        raise ValueError(f"{name} is not differentiable: its output does not depend on its input through autograd")
    weighted = sum((o.double() * w.double()).sum() for o, w in pairs)
    gradients = torch.autograd.grad(weighted, floating, allow_unused=True)
    if any(g is None for g in gradients):
        raise ValueError(f"{name} is not a residual step: part of its input does not reach its output")

    # Central differences along the gradient's own direction, where they are largest against rounding. Of several sizes
    # the best counts: the larger ones may cross kinks (ReLU), in the smaller ones rounding shows.
    norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    if norm == 0:
        return
    scale = max(float(t.detach().double().square().mean()) for t in floating) ** 0.5 or 1.0
    resolution = max(torch.finfo(t.dtype).eps for t in floating)
    size = sum(t.numel() for t in floating) ** 0.5 * scale * resolution ** (1 / 3)
    weights = {id(o): w for o, w in pairs}
    order = [weights.get(id(o)) for o in outputs]

    def along(distance: float) -> float:
        steps = iter(gradients)
        moved = tuple(t.detach() + distance / norm * next(steps) if t.is_floating_point() else t for t in leaves)
        with torch.no_grad():
            values = evaluate(moved)
        return sum(float((v.double() * w.double()).sum()) for v, w in zip(values, order, strict=True) if w is not None)

    differences = [(along(h) - along(-h)) / (2 * h) for h in (size, size / 4, size / 16, size / 64)]
    best = min(differences, key=lambda d: abs(d - norm))
    if not abs(best - norm) <= max(50 * resolution ** (2 / 3), 0.02) * norm:
        raise ValueError(
            f"the gradient of {name} disagrees with a finite difference of its output: {norm:.6g} against "
            f"{best:.6g} along the gradient; its backward is wrong or its output jumps"
        )
