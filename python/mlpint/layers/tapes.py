"""What is kept of one evaluated layer so that its vector-Jacobian products can be taken later.

Three kinds: the graph that autograd recorded; a layer's own tape, when its backward comes in two halves; and the inputs
alone, when memory is worth more than an evaluation (activation checkpointing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]
Grads = Sequence[torch.Tensor | None]
Count = Callable[[str], None]


class SplitTape(Protocol):
    """What ``split_forward`` of a layer with a two-part backward returns beside its output.

    A layer takes part by having ``split_forward(x, *args, **kwargs) -> (y, tape)``; it gets no tensor arguments that
    need gradients, and a state of one tensor.
    """

    def input_vjp(self, grad_output: torch.Tensor) -> torch.Tensor:
        """Gradient for the input. May be called several times; the tape keeps what the weights need of the last."""

    def weight_vjp(self) -> list[torch.Tensor | None]:
        """Gradients for those of the layer's parameters that require them, in order, for the last ``input_vjp``."""


class Tape(Protocol):
    """One evaluated layer. ``grads`` and the results have one entry for each differentiable tensor of the state."""

    def input_vjp(self, grads: Tensors, count: Count) -> Tensors:
        """Gradients for the inputs; the tape stays usable."""

    def finish(self, grads: Tensors, known: Tensors | None, count: Count) -> tuple[Tensors, Grads]:
        """Gradients for the inputs, and for parameters and extra tensors; the tape is used up.

        known: the gradients for the inputs, where the last ``input_vjp`` with the same ``grads`` has found them.
        """


class GraphTape:
    """The recorded graph of a layer.

    Args:
        inputs: leaves that the layer was evaluated at.
        outputs: the differentiable tensors it returned, in the order of the inputs.
        weights: parameters and extra tensors that gradients are wanted for.
    """

    __slots__ = ("inputs", "outputs", "weights")

    def __init__(self, inputs: Tensors, outputs: Tensors, weights: Tensors) -> None:
        self.inputs, self.outputs, self.weights = inputs, outputs, weights

    def _vjp(self, grads: Tensors, wanted: Tensors, retain: bool) -> Grads:
        pairs = [(o, g) for o, g in zip(self.outputs, grads, strict=True) if o.requires_grad]
        if not pairs:
            return [None] * len(wanted)
        outputs, grads = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, wanted, grads, retain_graph=retain, allow_unused=True)

    def _filled(self, grads: Grads) -> Tensors:
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, self.inputs, strict=True))

    def input_vjp(self, grads: Tensors, count: Count) -> Tensors:
        count("input_vjp")
        return self._filled(self._vjp(grads, self.inputs, retain=True))

    def finish(self, grads: Tensors, known: Tensors | None, count: Count) -> tuple[Tensors, Grads]:
        # autograd walks the input's path again to reach the parameters, so knowing the input's gradient saves nothing.
        count("combined_vjp")
        gradients = self._vjp(grads, (*self.inputs, *self.weights), retain=False)
        n = len(self.inputs)
        self.outputs = ()  # frees the graph
        return self._filled(gradients[:n]), gradients[n:]


class TwoPartTape:
    """A layer's own tape: input part when asked, weight part once.

    Args:
        tape: what the layer returned.
        h: step size, of x + h (layer(x) - x).
    """

    __slots__ = ("tape", "h")

    def __init__(self, tape: SplitTape, h: float) -> None:
        self.tape, self.h = tape, h

    def input_vjp(self, grads: Tensors, count: Count) -> Tensors:
        count("input_vjp")
        if self.h == 1:
            return (self.tape.input_vjp(grads[0]),)
        scaled = grads[0] * self.h
        return (self.tape.input_vjp(scaled) + (grads[0] - scaled),)

    def finish(self, grads: Tensors, known: Tensors | None, count: Count) -> tuple[Tensors, Grads]:
        input_gradients = self.input_vjp(grads, count) if known is None else known
        count("parameter_vjp")
        weight_gradients = self.tape.weight_vjp()
        del self.tape
        return input_gradients, weight_gradients


class RecomputeTape:
    """The inputs of a layer; every product evaluates it again and keeps nothing."""

    __slots__ = ("evaluate",)

    def __init__(self, evaluate: Callable[[Count], Tape]) -> None:
        self.evaluate = evaluate

    def input_vjp(self, grads: Tensors, count: Count) -> Tensors:
        return self.evaluate(count).input_vjp(grads, count)

    def finish(self, grads: Tensors, known: Tensors | None, count: Count) -> tuple[Tensors, Grads]:
        # A fresh tape has not seen the earlier input_vjp.
        return self.evaluate(count).finish(grads, None, count)
