"""Fine steps of layers that are modules of their own, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..mgrit import vectors
from ..state import State, version
from .arguments import arguments_of, has_arguments_by_layer
from .evaluator import GradientSums, LayerCall
from .layer_output import output_tensors
from .side_effects import refuse_gradient
from .tapes import GraphTape, RecomputeTape, Tape, TwoPartTape

Tensors = tuple[torch.Tensor, ...]


class ModuleEvaluator:
    """As :class:`mlpint.layers.evaluator.LayerEvaluator`, with a tape for each layer.

    Args:
        layers: own layers by index in the network.
        call: what they are called with.
        in_place: which layers change the state that they are given, as far as it is known; added to.
    """

    def __init__(self, layers: Mapping[int, nn.Module], call: LayerCall, in_place: dict[int, bool]) -> None:
        self.layers, self.call, self.in_place = layers, call, in_place
        self._same_for_all = None if has_arguments_by_layer(*call.arguments) else call.arguments
        self.single, self.evaluations = call.single, call.stats.evaluations
        self.tapes: dict[int, Tape] = {}
        self.gradients = GradientSums()
        self.where = ""

    @property
    def finishes_on_chain(self) -> bool:
        # A backward in two halves goes on where it was after the first.
        return not all(map(self._splits, self.layers.values()))

    # --- what the propagators call -----------------------------------------------------------------------------------

    def forward(self, layers: Sequence[int], states: Sequence[State], level: int, is_final: bool) -> list[State]:
        return self._each(layers, lambda i, n: self._forward(n, states[i], level, is_final))

    def input_vjp(self, layers: Sequence[int], states: Sequence[State], level: int, is_final: bool) -> list[State]:
        return self._each(layers, lambda i, n: self._input_vjp(n, states[i], level))

    def finish(
        self, layers: Sequence[int], states: Sequence[State], known: Sequence[State | None], level: int
    ) -> list[State]:
        return self._each(layers, lambda i, n: self._finish(n, states[i], known[i], level))

    def _each(self, layers: Sequence[int], step: Callable[[int, int], State]) -> list[State]:
        results = []
        for i, n in enumerate(layers):
            self.where = f"layer {n}"
            results.append(step(i, n))
        return results

    def _forward(self, n: int, state: State, level: int, is_final: bool) -> State:
        count = self._counter(level)
        count("forward")
        if not (is_final and self.call.record):
            with torch.no_grad():
                return State(self.evaluate(n, state.tensors))
        if self.call.recompute:
            with torch.no_grad():
                outputs = self.evaluate(n, state.tensors)

            def again(count: Callable[[str], None]) -> Tape:
                count("forward")
                return self._taped(n, state.tensors)[1]

            self.tapes[n] = RecomputeTape(again)
        else:
            outputs, self.tapes[n] = self._taped(n, state.tensors)
        return State(t.detach() for t in outputs)

    def _input_vjp(self, n: int, state: State, level: int) -> State:
        return State(self.tapes[n].input_vjp(state.tensors, self._counter(level)))

    def _finish(self, n: int, state: State, known: State | None, level: int) -> State:
        tape = self.tapes.pop(n)
        result, gradients = tape.finish(state.tensors, known.tensors if known else None, self._counter(level))
        for weight, gradient in zip(self._weights(n), gradients, strict=True):
            if gradient is not None:
                self.gradients.add(weight, gradient)
        return State(result)

    def _counter(self, level: int) -> Callable[[str], None]:
        evaluations = self.evaluations

        def count(kind: str) -> None:
            evaluations[kind][level] += 1

        return count

    # --- a layer -----------------------------------------------------------------------------------------------------

    def evaluate(self, n: int, tensors: Tensors) -> Tensors:
        """The state after a layer's step, under the layer's dropout key and in the present mode of autograd."""
        # The state is needed again: a layer that works in place gets a copy, and so does one that may be such a layer.
        # Where autograd records, one that is known not to gets another view: a graph of the same nodes, so that
        # gradients are added up in the same order, and are the same to the bit, before and after it is known.
        spared = self.in_place.get(n) is False
        x = tensors
        if not spared:
            x = tuple(t.clone() for t in tensors)
        elif torch.is_grad_enabled():
            x = tuple(t.view_as(t) for t in tensors)
        before = [version(t) for t in x]
        with self._autocast(tensors[0].device):
            output = self._keyed(n, x[0] if self.single else x, self.layers[n])
        changed = before != [version(t) for t in x]
        if spared and changed:
            raise RuntimeError(f"layer {n} changes its state in place in some evaluations alone: let it do so in none")
        if not torch.is_inference_mode_enabled():  # which does not count changes
            self.in_place[n] = self.in_place.get(n, False) or changed
        return self._moved(n, tensors, output_tensors(n, output, tensors, self.single))

    def _keyed(self, n: int, x: Any, function: Callable[..., Any]) -> Any:
        """A layer's forward or split_forward under the layer's dropout key."""
        random, training = self.call.random, self.layers[n].training
        args, kwargs = self._same_for_all or arguments_of(*self.call.arguments, n)
        device = (x if self.single else x[0]).device
        with random.keyed(*self.call.key, n, training, device):
            return function(x, *args, **kwargs)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        dtype = self.call.autocast_dtype
        if dtype is None:
            return nullcontext()
        # The cache of cast weights would hand a cast made without gradients to an evaluation that records.
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)

    def _moved(self, n: int, old: Tensors, new: Tensors) -> Tensors:
        """The step of size h from what the layer makes of a state."""
        h = self.call.step_size_of(n)
        return new if h == 1 else vectors.extrapolate(State(old), State(new), h).tensors

    def _taped(self, n: int, tensors: Tensors) -> tuple[Tensors, Tape]:
        layer: Any = self.layers[n]
        if self._splits(layer):
            with torch.no_grad(), self._autocast(tensors[0].device):
                output, tape = self._keyed(n, tensors[0], layer.split_forward)
                outputs = self._moved(n, tensors, output_tensors(n, output, tensors, True))
            return outputs, TwoPartTape(tape, self.call.step_size_of(n))
        inputs = tuple(t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors)
        for leaf in _differentiable(inputs):
            leaf.register_post_accumulate_grad_hook(refuse_gradient)
        with torch.enable_grad():
            outputs = self.evaluate(n, inputs)
        return outputs, GraphTape(_differentiable(inputs), _differentiable(outputs), self._weights(n))

    def _splits(self, layer: nn.Module) -> bool:
        return self.single and not self.call.extras and hasattr(layer, "split_forward")

    def _weights(self, n: int) -> Tensors:
        """What a layer's gradients are wanted for beside its state."""
        return (*self.call.parameters.get(n, ()), *self.call.extras)


def _differentiable(tensors: Tensors) -> Tensors:
    return tuple(t for t in tensors if t.is_floating_point())
