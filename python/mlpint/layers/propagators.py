"""The steps of the C++ solver in either direction: layers forwards, their vector-Jacobian products backwards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from .._core import Sweep
from ..mgrit import recorder, vectors
from ..mgrit.learnt_operator import LearntOperator
from ..state import State
from .batch_slices import BatchSlices
from .consistency import ConsistencyPart
from .evaluator import LayerEvaluator
from .sliced_evaluator import SlicedEvaluator
from .stack_evaluator import stacked_states


def increments(u: State, outputs: Sequence[State]) -> State:
    """The sum of output - u, tensor by tensor, in few operations; integer tensors are carried over from u."""

    def summed(i: int, t: torch.Tensor) -> torch.Tensor:
        single = len(u.tensors) == 1
        stacked = stacked_states(outputs) if single else torch.stack([output.tensors[i] for output in outputs])
        return (stacked - t).sum(0)

    return State(summed(i, t) if t.is_floating_point() else t for i, t in enumerate(u.tensors))


class Propagator:
    """What both directions share; see csrc/propagator.hpp.

    Args:
        evaluator: takes the steps.
        template: a state of the solver's, for its shapes.
        rank: of this process, for errors.
        first_layer: the layer at position 0.
        slices: of the batch in chains, where there are several; then the evaluator has parts.
        operator: the coarse operator, if it is one that learns.
        learning: whether it learns from this pass.
        consistency: the consistency term of the pass, if there is one.
        exact: whether the solve is an exact sweep.
    """

    operations = {Sweep.intermediate: "relaxation", Sweep.final_coarse: "coarse sweep", Sweep.final_fine: "last sweep"}
    direction = ""

    def __init__(
        self,
        evaluator: LayerEvaluator,
        template: State,
        rank: int,
        first_layer: int,
        slices: BatchSlices | None = None,
        operator: LearntOperator | None = None,
        learning: bool = False,
        consistency: ConsistencyPart | None = None,
        exact: bool = False,
    ) -> None:
        self.consistency, self.exact = consistency, exact
        self.evaluator, self.template, self.rank, self.first_layer = evaluator, template, rank, first_layer
        self.batch_slices = slices
        self._parts: Sequence[LayerEvaluator] = evaluator.parts if isinstance(evaluator, SlicedEvaluator) else ()
        # The solver asks for one only where its coarse operator is one that learns.
        self.operator: Any = operator
        self.learning = learning and operator is not None

    extrapolate = staticmethod(vectors.extrapolate)
    axpy = staticmethod(vectors.axpy)
    squared_norm = staticmethod(vectors.squared_norm)
    increments = staticmethod(increments)

    def empty(self, index: int) -> State:
        return (self.template if index < 0 else self.slice(self.template, index)).empty_like()

    def slices(self) -> int:
        return len(self.batch_slices) if self.batch_slices else 1

    def slice(self, state: State, index: int) -> State:
        assert self.batch_slices is not None
        return self.batch_slices.slice(state, index)

    def join(self, states: list[State]) -> State:
        assert self.batch_slices is not None
        return self.batch_slices.join(states)

    def finishes_on_chain(self) -> bool:
        return False

    def learns(self) -> bool:
        return self.learning and self.operator.begin_pass()

    def learnt_step(self, position: int, length: int, u: State, v: State) -> State:
        return self.operator.step(position, length, u, v)

    def observe(self, position: int, length: int, u: State, v: State, end: State) -> None:
        self.operator.observe(position, length, u, v, end)

    def layer(self, position: int) -> int:
        raise NotImplementedError

    def steps(
        self,
        evaluator: LayerEvaluator,
        layers: list[int],
        inputs: list[State],
        outputs: list[State | None],
        level: int,
        sweep: Sweep,
    ) -> list[State]:
        raise NotImplementedError

    def evaluate(
        self,
        positions: list[int],
        inputs: list[State],
        outputs: list[State | None],
        level: int,
        sweep: Sweep,
        index: int = -1,
    ) -> list[State]:
        evaluator = self.evaluator if index < 0 else self._parts[index]
        layers = [self.layer(p) for p in positions]
        try:
            if recorder.active is None:
                return self.steps(evaluator, layers, inputs, outputs, level, sweep)
            with recorder.active.evaluation(layers, level, self.direction, index):
                return self.steps(evaluator, layers, inputs, outputs, level, sweep)
        except BaseException as error:
            where = f"{evaluator.where}, level {level}, {self.direction} {self.operations[sweep]}"
            annotate(error, self.rank, where)
            raise


def annotate(error: BaseException, rank: int, where: str) -> None:
    """Adds to an error, as a note, which rank failed doing what; notes of what is no error are shown at once."""
    note = f"[mlpint] rank {rank}, {where}"
    error.add_note(note)
    if not isinstance(error, Exception):  # nobody prints the notes of sys.exit or Ctrl-C
        print(f"{note}: {type(error).__name__}", file=sys.stderr, flush=True)


class ForwardPropagator(Propagator):
    """Position p is layer ``first_layer + p``."""

    direction = "forward"

    def layer(self, position: int) -> int:
        return self.first_layer + position

    def steps(
        self,
        evaluator: LayerEvaluator,
        layers: list[int],
        inputs: list[State],
        outputs: list[State | None],
        level: int,
        sweep: Sweep,
    ) -> list[State]:
        # Whatever the coarse sweep evaluated for good was recorded there and then.
        lacking = [i for i, known in enumerate(outputs) if known is None]
        states = iter(
            evaluator.forward(
                [layers[i] for i in lacking], [inputs[i] for i in lacking], level, is_final=sweep != Sweep.intermediate
            )
            if lacking
            else ()
        )
        results = [next(states) if known is None else known for known in outputs]
        if self.consistency is not None and sweep == Sweep.final_fine:
            for layer, before, after in zip(layers, inputs, results, strict=True):
                self.consistency.see(layer, before, after)
        return results


class AdjointPropagator(Propagator):
    """Position p is layer ``first_layer - p``; the step is lambda -> J^T lambda."""

    direction = "backward"

    def finishes_on_chain(self) -> bool:
        # Generic modules take the input's path again for their parameters; here it is taken once. The consistency term
        # takes other products for the parameters than the chain's.
        return self.evaluator.finishes_on_chain and self.consistency is None

    def layer(self, position: int) -> int:
        return self.first_layer - position

    def steps(
        self,
        evaluator: LayerEvaluator,
        layers: list[int],
        inputs: list[State],
        outputs: list[State | None],
        level: int,
        sweep: Sweep,
    ) -> list[State]:
        if sweep == Sweep.final_fine and self.consistency is not None:
            return self._steps_with_term(self.consistency, evaluator, layers, inputs, outputs, level)
        if sweep == Sweep.final_fine:
            return evaluator.finish(layers, inputs, outputs, level)
        return evaluator.input_vjp(layers, inputs, level, is_final=sweep == Sweep.final_coarse)

    def _steps_with_term(
        self,
        term: ConsistencyPart,
        evaluator: LayerEvaluator,
        layers: list[int],
        inputs: list[State],
        known: list[State | None],
        level: int,
    ) -> list[State]:
        if self.exact:
            return [
                term.exact_step(
                    n,
                    cotangent,
                    lambda x, n=n: evaluator.input_vjp([n], [x], level, is_final=False)[0],  # type: ignore[misc]
                    lambda x, n=n: evaluator.finish([n], [x], [None], level)[0],  # type: ignore[misc]
                )
                for n, cotangent in zip(layers, inputs, strict=True)
            ]
        added = [term.added(n) for n in layers]
        changed = [x if a is None else vectors.axpy(1.0, a, x) for x, a in zip(inputs, added, strict=True)]
        still_known = [k if a is None else None for k, a in zip(known, added, strict=True)]
        results = evaluator.finish(layers, changed, still_known, level)
        return [term.left(n, result) for n, result in zip(layers, results, strict=True)]

    def observe(self, position: int, length: int, u: State, v: State, end: State) -> None:
        if self.consistency is not None:
            u = self.consistency.observed_from(self.layer(position), u)
        super().observe(position, length, u, v, end)
