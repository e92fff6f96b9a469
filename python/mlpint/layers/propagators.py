"""Fine steps for the C++ solver: layers forwards, their vector-Jacobian products backwards."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .._core import Sweep
from ..mgrit import vectors
from ..mgrit.learnt_operator import LearntOperator
from ..mgrit.stats import Stats
from ..state import State, describe
from .random_keys import LayerRandom
from .stack_evaluator import StackStream
from .tapes import GraphTape, RecomputeTape, Tape, TwoPartTape


def output_tensors(layer: int, output: Any, inputs: Sequence[torch.Tensor], single: bool) -> tuple[torch.Tensor, ...]:
    """The new state in what a layer returned, checked against the old one.

    A layer whose state is one tensor may return a tuple that starts with it, as Hugging Face's do.

    Raises:
        ValueError: naming the layer, if shapes or dtypes changed.
    """
    if single and isinstance(output, torch.Tensor):
        tensors: tuple[torch.Tensor, ...] = (output,)
    elif isinstance(output, tuple | list) and output:
        tensors = tuple(output[:1]) if single else tuple(output)
    else:
        tensors = ()
    if len(tensors) != len(inputs) or not all(isinstance(t, torch.Tensor) for t in tensors):
        raise ValueError(
            f"layer {layer} returned {type(output).__name__}, but its state is "
            f"{'one tensor' if single else f'a tuple of {len(inputs)} tensors'}"
        )
    for new, old in zip(tensors, inputs, strict=True):
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(
                f"layer {layer} turned {describe([old])} into {describe([new])}; "
                "the layers of a LayerParallel stack must keep shape and dtype"
            )
    return tensors


class Stream:
    """One batch on its way through this rank's layers: arguments, dropout key, and the tapes for the way back.

    Args:
        layers: own layers by index in the stack.
        step_sizes: h by layer index.
        arguments: positional and keyword arguments for every layer.
        extras: the tensors among them that gradients are wanted for (leaves).
        parameters: own parameters that require gradients, by layer index.
        single: whether the state is one tensor, as opposed to a tuple.
        record: keep tapes, so that a backward can follow.
        key: (step, microbatch) of the dropout keys.
    """

    def __init__(
        self,
        layers: dict[int, nn.Module],
        step_sizes: Callable[[int], float],
        arguments: tuple[tuple, dict],
        extras: tuple[torch.Tensor, ...],
        parameters: dict[int, tuple[nn.Parameter, ...]],
        *,
        single: bool,
        record: bool,
        recompute: bool,
        random: LayerRandom,
        key: tuple[int, int],
        stats: Stats,
    ) -> None:
        self.layers, self.step_sizes = layers, step_sizes
        self.args, self.kwargs = arguments
        self.extras, self.parameters = extras, parameters
        self.single, self.record, self.recompute = single, record, recompute
        self.random, self.key, self.stats = random, key, stats
        self.tapes: dict[int, Tape] = {}
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}
        self.where = ""  # the layer at work, for errors

    def _keyed(self, n: int, x: Any, function: Callable[..., Any]) -> Any:
        """A layer's forward or split_forward under the layer's dropout key."""
        training = self.layers[n].training
        if not self.random.draws(n, training):
            return function(x, *self.args, **self.kwargs)
        device = (x if self.single else x[0]).device
        with self.random.keyed(*self.key, n, training, device):
            return function(x, *self.args, **self.kwargs)

    def _call(self, n: int, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        output = self._keyed(n, tensors[0] if self.single else tensors, self.layers[n])
        return self._moved(n, tensors, output_tensors(n, output, tensors, self.single))

    def _moved(self, n: int, old: tuple[torch.Tensor, ...], new: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The step of size h from what the layer makes of a state."""
        h = self.step_sizes(n)
        return new if h == 1 else vectors.extrapolate(State(old), State(new), h).tensors

    def _differentiable(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in tensors if t.is_floating_point())

    def _taped(self, n: int, tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], Tape]:
        if self.single and not self.extras and hasattr(self.layers[n], "split_forward"):
            with torch.no_grad():
                (output, tape), h = self._keyed(n, tensors[0], self.layers[n].split_forward), self.step_sizes(n)
                new = output_tensors(n, output, tensors, True)
                return self._moved(n, tensors, new), TwoPartTape(tape, h)
        inputs = tuple(t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors)
        with torch.enable_grad():
            outputs = self._call(n, inputs)
        weights = (*self.parameters.get(n, ()), *self.extras)
        return outputs, GraphTape(self._differentiable(inputs), self._differentiable(outputs), weights)

    def forward(self, layers: list[int], states: list[State], level: int, keep: bool) -> list[State]:
        """Evaluates layers; ``keep`` at their final values, so that tapes are wanted."""
        return self._each(layers, lambda i, n: self._forward(n, states[i], level, keep))

    def input_vjp(self, layers: list[int], states: list[State], level: int, keep: bool) -> list[State]:
        """Gradients for the inputs; ``keep`` where :meth:`finish` will be told them again."""
        return self._each(layers, lambda i, n: self._input_vjp(n, states[i], level))

    def finish(self, layers: list[int], states: list[State], known: list[State | None], level: int) -> list[State]:
        """The last products with layers: gradients are added up, and their tapes are freed."""
        return self._each(layers, lambda i, n: self._finish(n, states[i], known[i], level))

    def _each(self, layers: list[int], step: Callable[[int, int], State]) -> list[State]:
        results = []
        for i, n in enumerate(layers):
            self.where = f"layer {n}"
            results.append(step(i, n))
        return results

    def _forward(self, n: int, state: State, level: int, keep: bool) -> State:
        count = self._counter(level)
        count("forward")
        if not (keep and self.record):
            with torch.no_grad():
                return State(self._call(n, state.tensors))
        if self.recompute:
            with torch.no_grad():
                outputs = self._call(n, state.tensors)

            def evaluate(count: Callable[[str], None]) -> Tape:
                count("forward")
                return self._taped(n, state.tensors)[1]

            self.tapes[n] = RecomputeTape(evaluate)
        else:
            outputs, self.tapes[n] = self._taped(n, state.tensors)
        return State(t.detach() for t in outputs)

    def _input_vjp(self, n: int, state: State, level: int) -> State:
        return State(self.tapes[n].input_vjp(state.tensors, self._counter(level)))

    def _finish(self, n: int, state: State, known: State | None, level: int) -> State:
        tape = self.tapes.pop(n)
        result, found = tape.finish(state.tensors, known.tensors if known else None, self._counter(level))
        for weight, gradient in zip((*self.parameters.get(n, ()), *self.extras), found, strict=True):
            if gradient is not None:
                self.add_gradient(weight, gradient)
        return State(result)

    def add_gradient(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        old = self.gradients.get(weight)
        self.gradients[weight] = gradient if old is None else old + gradient

    def _counter(self, level: int) -> Callable[[str], None]:
        evaluations = self.stats.evaluations

        def count(kind: str) -> None:
            evaluations[kind][level] += 1

        return count


AnyStream = Stream | StackStream


class _Propagator:
    """The vector operations that both directions share; see csrc/propagator.hpp."""

    operations = {Sweep.intermediate: "relaxation", Sweep.final_coarse: "coarse sweep", Sweep.final_fine: "last sweep"}
    direction = ""

    def __init__(
        self, stream: AnyStream, template: State, rank: int, origin: int, operator: LearntOperator | None = None
    ) -> None:
        self.stream, self.template, self.rank, self.origin, self.operator = stream, template, rank, origin, operator

    extrapolate = staticmethod(vectors.extrapolate)
    axpy = staticmethod(vectors.axpy)
    squared_norm = staticmethod(vectors.squared_norm)

    def empty(self) -> State:
        return self.template.empty_like()

    def learns(self) -> bool:
        return self.operator.begin_pass()

    def learnt_step(self, position: int, length: int, u: State, v: State) -> State:
        return self.operator.step(position, length, u, v)

    def observe(self, position: int, length: int, u: State, v: State, end: State) -> None:
        self.operator.observe(position, length, u, v, end)

    def layer(self, position: int) -> int:
        raise NotImplementedError

    def steps(
        self, layers: list[int], inputs: list[State], outputs: list[State | None], level: int, sweep: Sweep
    ) -> list[State]:
        raise NotImplementedError

    def evaluate(
        self, positions: list[int], inputs: list[State], outputs: list[State | None], level: int, sweep: Sweep
    ) -> list[State]:
        try:
            return self.steps([self.layer(p) for p in positions], inputs, outputs, level, sweep)
        except BaseException as error:
            where = f"{self.stream.where}, level {level}, {self.direction} {self.operations[sweep]}"
            annotate(error, self.rank, where)
            raise


def annotate(error: BaseException, rank: int, where: str) -> None:
    """Adds to an error, as a note, which rank failed doing what; notes of what is no error are shown at once."""
    note = f"[mlpint] rank {rank}, {where}"
    error.add_note(note)
    if not isinstance(error, Exception):  # sys.exit, Ctrl-C: nobody prints their notes
        print(f"{note}: {type(error).__name__}", file=sys.stderr, flush=True)


class ForwardPropagator(_Propagator):
    """Position p is layer ``origin + p``."""

    direction = "forward"

    def layer(self, position: int) -> int:
        return self.origin + position

    def steps(
        self, layers: list[int], inputs: list[State], outputs: list[State | None], level: int, sweep: Sweep
    ) -> list[State]:
        # Whatever the chain evaluated for good was taped there and then.
        lacking = [i for i, known in enumerate(outputs) if known is None]
        results = list(outputs)
        if lacking:
            found = self.stream.forward(
                [layers[i] for i in lacking], [inputs[i] for i in lacking], level, keep=sweep != Sweep.intermediate
            )
            for i, state in zip(lacking, found, strict=True):
                results[i] = state
        return results


class AdjointPropagator(_Propagator):
    """Position p is layer ``origin - p``; the step is lambda -> J^T lambda."""

    direction = "backward"

    def layer(self, position: int) -> int:
        return self.origin - position

    def steps(
        self, layers: list[int], inputs: list[State], outputs: list[State | None], level: int, sweep: Sweep
    ) -> list[State]:
        if sweep == Sweep.final_fine:
            return self.stream.finish(layers, inputs, outputs, level)
        return self.stream.input_vjp(layers, inputs, level, keep=sweep == Sweep.final_coarse)


def merge_gradients(streams: Sequence[AnyStream]) -> dict[torch.Tensor, torch.Tensor]:
    """Sums the gradients of several microbatches."""
    if len(streams) == 1:
        return streams[0].gradients
    total: dict[torch.Tensor, Any] = defaultdict(lambda: 0)
    for stream in streams:
        for weight, gradient in stream.gradients.items():
            total[weight] = total[weight] + gradient
    return total
