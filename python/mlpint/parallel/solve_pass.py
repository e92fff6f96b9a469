"""One forward pass through a layer-parallel stack and its way back: solver, serial edges, exchanges between ranks."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .._core import Sweep
from ..comm.agreement import agree
from ..layers.batch_slices import BatchSlices, Tensors, can_be_sliced
from ..layers.consistency import ConsistencyPart, ConsistencyTerm
from ..layers.evaluator import LayerCall, LayerEvaluator
from ..layers.propagators import AdjointPropagator, ForwardPropagator, Propagator, annotate
from ..layers.side_effects import ArgumentWatch, kept_buffers, refuse_gradient
from ..layers.sliced_evaluator import SlicedEvaluator, chained_layers
from ..mgrit import recorder
from ..mgrit.solvers import AnySolver
from ..mgrit.stats import Stats
from ..state import State, describe, version
from .auto_slices import fastest_slices
from .compiled import graphs_kept
from .conditions import PassSetup
from .out_of_step import in_step
from .pass_checks import (
    check_replicas,
    check_samples,
    check_ties,
    warn_of_poor_gradients,
    watched_buffers,
    watched_generators,
)
from .pass_keys import in_checkpoint


class SolvePass:
    """One call of a stack, and its way back.

    Args:
        setup: what the stack hands to the pass.
        state: the tensors of x.
        single: whether x is one tensor.
        args, kwargs: passed to every layer.
        record: whether a backward may follow.
    """

    def __init__(
        self,
        setup: PassSetup,
        state: tuple[torch.Tensor, ...],
        single: bool,
        args: tuple,
        kwargs: dict[str, Any],
        record: bool,
    ) -> None:
        self.setup, self.conditions, self.single, self.record = setup, setup.conditions, single, record
        self.layout, self.options = self.conditions.layout, self.conditions.options
        self.comm, self.stats = setup.comm, setup.stats
        self.state = State(t.detach() for t in state)
        self._state_needs = any(t.requires_grad for t in state)
        device_type = state[0].device.type
        autocast = torch.is_autocast_enabled(device_type)
        # In the backward autocast is off, as it is in torch's own: only a layer's evaluation has it, a second one too.
        self.autocast_dtype = torch.get_autocast_dtype(device_type) if autocast else None
        self._find_extras(args, kwargs)
        setup.shared.check()
        self.parameters = self.conditions.store.trainable_parameters() if record else {}
        self.weights = tuple(dict.fromkeys(p for ps in self.parameters.values() for p in ps))
        self._versions = self._present_versions()
        self.evaluators: list[LayerEvaluator] = []
        self.term: ConsistencyTerm | None = None
        self.terms: list[ConsistencyPart | None] = []
        self.microbatches: BatchSlices | None = None
        self.chain: BatchSlices | None = None
        self._watches: list[ArgumentWatch] = []
        self.used = False

    # --- arguments ---------------------------------------------------------------------------------------------------

    def _find_extras(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tensor arguments that need gradients: each layer's contribution is taken at a leaf of its own."""
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self.extras = tuple(
            dict.fromkeys(t for t in leaves if self.record and isinstance(t, torch.Tensor) and t.requires_grad)
        )
        self.extra_leaves = tuple(t.detach().requires_grad_() for t in self.extras)
        for leaf in self.extra_leaves:
            leaf.register_post_accumulate_grad_hook(refuse_gradient)
        substitute = dict(zip(self.extras, self.extra_leaves, strict=True))
        self._arguments = [substitute.get(t, t) if isinstance(t, torch.Tensor) else t for t in leaves]

    def _make_evaluators(self) -> list[LayerEvaluator]:
        """One evaluator for the whole batch, or one for each microbatch of the pipeline of exact sweeps."""
        self.term = self._consistency_term()
        self.microbatches, self.chain = self._slices()
        count = len(self.microbatches) if self.microbatches else 1
        self.terms = [ConsistencyPart(self.term) if self.term else None for _ in range(count)]
        evaluators = [self._make_evaluator(self.microbatches, i, count) for i in range(count)]
        for evaluator in evaluators[1:]:  # one sum of all: what microbatches leave behind does not pile up
            evaluator.gradients = evaluators[0].gradients
        return evaluators

    def _make_evaluator(self, microbatches: BatchSlices | None, i: int, count: int) -> LayerEvaluator:
        step, microbatch = self.setup.key
        whole = self._call(microbatches, i, (step, microbatch * count + i), self.stats)
        make = self.conditions.store.evaluator
        if self.chain is None:
            return make(whole)
        # A layer is counted once, with the first slice.
        calls = [
            self._call(self.chain, j, (step, microbatch * len(self.chain) + j), Stats() if j else self.stats)
            for j in range(len(self.chain))
        ]
        chained = chained_layers(self.layout, self.options)
        return SlicedEvaluator(make(whole), [make(call) for call in calls], self.chain, chained)

    def _call(
        self, slices: BatchSlices | None, i: int, key: tuple[int, int], stats: Stats, record: bool | None = None
    ) -> LayerCall:
        arguments = self._arguments
        if slices is not None:
            with torch.enable_grad():
                arguments = [slices.argument(a, i) for a in arguments]
        call = LayerCall(
            pytree.tree_unflatten(arguments, self._spec),
            self.single,
            self.layout.step_size_of,
            self.conditions.layer_random,
            key,
            stats,
            self.record if record is None else record,
            self.conditions.recompute,
            self.extra_leaves,
            self.parameters,
            adds=self.chain is not None or self.microbatches is not None,
            autocast_dtype=self.autocast_dtype,
        )
        self._watches.append(ArgumentWatch(call.arguments))
        return call

    def _consistency_term(self) -> ConsistencyTerm | None:
        c = self.conditions
        if not c.consistency or not self.record:
            return None
        operator = self.setup.operators.operator(self.layout, self.options, "forward", self.autocast_dtype)
        return ConsistencyTerm(c.consistency, self.layout, self.options, operator, self.stats.inconsistency)

    def _slices(self) -> tuple[BatchSlices | None, BatchSlices | None]:
        """How exact sweeps, and how the chains of others, take the batch: None for whole."""
        c, batch, exact = self.conditions, self.state.tensors[0].shape[:1], self.options.exact
        if self.record and c.chain_slices != "auto" and c.chain_slices > max(1, *batch):
            raise ValueError(
                f"chain_slices = {c.chain_slices} is more than the batch of {batch[0] if batch else 1} has samples"
            )
        nobody_waits = self.comm.size == 1 and not exact
        # The term's parts are of the whole batch, or of one microbatch of both directions.
        one_way = not exact and self.term is not None and any(map(self._is_exact, ("forward", "backward")))
        arguments = pytree.tree_unflatten(self._arguments, self._spec)
        if nobody_waits or one_way or (batch and batch[0] < 2) or not can_be_sliced(self.state, arguments):
            return None, None
        chain = self._measured_slices() if c.chain_slices == "auto" else c.chain_slices
        count = min(max(chain, c.serial_microbatches) if exact else chain, *batch)
        self.stats.slices = count
        if count == 1:
            return None, None
        slices = BatchSlices(batch[0], count)
        return (slices, None) if exact else (None, slices)

    def _measured_slices(self) -> int:
        """What :func:`fastest_slices` says for this number of samples, asked once."""
        found, samples = self.setup.slices_found, self.state.tensors[0].shape[0]
        if self.comm.size == 1:
            return 1
        if samples not in found:

            def run_first(slices: BatchSlices) -> None:
                call = self._call(slices, 0, self.setup.key, Stats(), record=False)
                self._plain(call, tuple(slices.slice(self.state, 0).tensors))

            with in_step(self.comm):
                found[samples] = fastest_slices(self.comm, self.state, run_first)
        return found[samples]

    def _plain(self, call: LayerCall, state: Tensors) -> Tensors:
        """This rank's layers one after the other, for their own sake: nothing is kept or counted."""
        with torch.no_grad(), kept_buffers(self.conditions.store.modules):
            return self.conditions.store.run(call, state)

    # --- forwards and backwards --------------------------------------------------------------------------------------

    def forward(self) -> tuple[torch.Tensor, ...]:
        layout, owns_first = self.layout, self.comm.rank == self.layout.first_rank
        with self._phase("forward", self.state.tensors):
            check_replicas(self.setup, "the state before the stack", self.state)
            if self.record:
                check_ties(self.setup)
            self._find_need()
            self._solver("forward")  # where options are refused, they are before data moves
            self.evaluators = self._make_evaluators()
            if self.microbatches or self.chain:
                call = self._call(None, 0, self.setup.key, Stats(), record=False)
                check_samples(self.setup, self.state, functools.partial(self._plain, call))
            finals = []
            with watched_buffers(self.setup, len(self.evaluators)), watched_generators(self.setup), in_step(self.comm):
                for i, evaluator in enumerate(self.evaluators):
                    state = self.microbatches.slice(self.state, i) if self.microbatches else self.state
                    if owns_first:
                        state = self._serial_forward(evaluator, layout.open_indices, state)
                    propagator = self._propagator(ForwardPropagator, i, state, layout.open_layers)
                    final = self._solve(propagator, state if owns_first else None)
                    if final is not None:
                        finals.append(self._serial_forward(evaluator, layout.close_indices, final))
                outputs = self._share(finals, self.state, layout.last_rank)
            self._check_arguments()
            return outputs

    def backward(self, grads: Sequence[torch.Tensor], wanted: Sequence[bool]) -> list[torch.Tensor | None]:
        """Gradients for the state, the extra tensors and this rank's parameters, in that order.

        wanted: which of them; those of the state are found on one rank and sent to the others only if wanted.
        """
        if self.used:
            raise RuntimeError(
                "backward a second time through a LayerParallel stack: its graphs are freed as they are used; "
                "call the stack again"
            )
        self.used = True
        if self._present_versions() != self._versions:
            raise RuntimeError(
                "the state before the stack or one of its parameters was changed in place between its forward and its "
                "backward, whose gradients would belong to neither value: step the optimiser after the backward"
            )
        warn_of_poor_gradients(self.setup)
        layout, owns_last = self.layout, self.comm.rank == self.layout.last_rank
        floating = [t.is_floating_point() for t in self.state.tensors]
        template = State(t for t, f in zip(self.state.tensors, floating, strict=True) if f)
        incoming = State(
            g.detach().to(t.dtype) for g, t, f in zip(grads, self.state.tensors, floating, strict=True) if f
        )
        wants_state = any(wanted[: len(floating)])
        with self._phase("backward", incoming.tensors, f"gradient for the input: {wants_state}"):
            check_replicas(self.setup, "the gradient for the state after the stack", incoming)
            self._solver("backward")
            finals = []
            with in_step(self.comm):
                for i, evaluator in enumerate(self.evaluators):
                    lam = self.microbatches.slice(incoming, i) if self.microbatches else incoming
                    if owns_last:
                        lam = self._serial_backward(evaluator, layout.close_indices, lam)
                    last_layer = layout.open_layers + layout.depth - 1
                    propagator = self._propagator(AdjointPropagator, i, lam, last_layer)
                    final = self._solve(propagator, lam if owns_last else None)
                    if final is not None:
                        finals.append(self._serial_backward(evaluator, layout.open_indices, final))
                gradients = self.evaluators[0].gradients
                if (ready := self.setup.gradients_ready()) is not None:  # other ranks may still be at their layers
                    shared_by_ranks = {p for p, _ in self.setup.shared.parameters}
                    ready({p: gradients[p] for p in self.weights if p in gradients and p not in shared_by_ranks})
                result: list[torch.Tensor | None] = [None] * len(floating)
                if wants_state:
                    shared = iter(self._share(finals, template, layout.first_rank))
                    result = [next(shared) if f else None for f in floating]
                result += self._sum_extras(gradients)
                self.setup.shared.sum(gradients)
                result += [gradients.get(p) for p in self.weights]
        self.evaluators, self.terms = [], []
        return result

    def _propagator(self, kind: type[Propagator], i: int, template: State, first_layer: int) -> Propagator:
        """For the batch, or microbatch i of it."""
        operator = self.setup.operators.operator(self.layout, self.options, kind.direction, self.autocast_dtype)
        learning = self.conditions.learning
        return kind(
            self.evaluators[i],
            template,
            self.comm.rank,
            first_layer,
            self.chain,
            operator,
            learning,
            self.terms[i],
            self._is_exact(kind.direction),
        )

    def _is_exact(self, direction: str) -> bool:
        return self.options.iterations(direction) == 0

    def _solver(self, direction: str) -> AnySolver:
        norms = self.conditions.watch_residuals
        return self.setup.solvers.solver(self.layout, self.options, direction, norms=norms)

    def _solve(self, propagator: Propagator, initial: State | None) -> State | None:
        direction, solver = propagator.direction, self._solver(propagator.direction)
        try:
            with recorder.active.solve(solver, direction) if recorder.active else nullcontext():
                result = solver.solve(propagator, initial, self.options.iterations(direction))
        except BaseException as error:
            if not getattr(error, "__notes__", None):
                operation, level, position = solver.where
                where = f"layer {propagator.layer(position)}, level {level}, {direction} {operation}"
                annotate(error, self.comm.rank, where)
            raise
        self.stats.iterations[direction] = result.iterations
        self.stats.residual_norms[direction] = result.residual_norms
        self.stats.seconds["wait"] += result.waited
        if recorder.active is not None:
            recorder.active.exchanges(result, direction)
        return result.final_value

    def _serial_forward(self, evaluator: LayerEvaluator, layers: range, state: State) -> State:
        propagator = ForwardPropagator(evaluator, state, self.comm.rank, 0)
        for n in layers:
            state = propagator.evaluate([n], [state], [None], 0, Sweep.final_fine)[0]
        return state

    def _serial_backward(self, evaluator: LayerEvaluator, layers: range, lam: State) -> State:
        propagator = AdjointPropagator(evaluator, lam, self.comm.rank, 0)
        for n in reversed(layers):
            lam = propagator.evaluate([-n], [lam], [None], 0, Sweep.final_fine)[0]
        return lam

    def _share(self, finals: list[State], template: State, owner: int) -> tuple[torch.Tensor, ...]:
        """Brings the microbatches of the owner together and to every rank."""
        if self.comm.rank != owner:
            state = template.empty_like()
        elif len(finals) == 1:
            state = finals[0]
        else:
            assert self.microbatches is not None
            state = self.microbatches.join(finals)
        if self.comm.size > 1:
            started = time.perf_counter()
            with recorder.span("share"):
                self.comm.transport.broadcast(state, owner)
            self.stats.seconds["wait"] += time.perf_counter() - started
        return state.tensors

    def _find_need(self) -> None:
        """Where nothing on any rank needs a gradient, the pass is one without a way back, as under no_grad."""
        if self.record and not self._state_needs and not self.extras:
            self.record = (
                self.comm.transport.control.sum(float(bool(self.weights))) > 0
                if self.comm.size > 1
                else bool(self.weights)
            )

    def _check_arguments(self) -> None:
        """Refuses layers that have changed their arguments, which not all of their evaluations should.

        Raises:
            RuntimeError: on all ranks, where arguments have containers in them.
        """
        changed = next(filter(None, (watch.changed() for watch in self._watches)), "")
        collective = any(watch.has_containers for watch in self._watches)
        self._watches = []
        if self.comm.size > 1 and collective:
            changed = next((m.decode() for m in self.comm.gather(changed.encode()) if m), "")
        if changed:
            with nullcontext() if collective else in_step(self.comm):
                raise RuntimeError(
                    f"[mlpint] a layer changes its argument {changed}: in a LayerParallel stack a layer is evaluated "
                    "several times, on one rank, and what it leaves in a list, dictionary or tensor is lost or wrong. "
                    "Return it as a part of the state, which may be a tuple of tensors"
                )

    def _present_versions(self) -> list[int]:
        return [version(t) for t in (*self.state.tensors, *self.weights)]

    def _sum_extras(self, gradients: dict[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        pairs = [(leaf, gradients.get(leaf)) for leaf in self.extra_leaves]
        sums = [torch.zeros_like(leaf) if g is None else g.clone() for leaf, g in pairs]
        if sums and self.comm.size > 1:
            self.comm.sum_ordered(sums)
        return sums

    @contextmanager
    def _phase(self, direction: str, tensors: Sequence[torch.Tensor], more: str = "") -> Iterator[None]:
        """What holds around either direction: agreement of the ranks first, random state, time."""
        started = time.perf_counter()
        agree(
            self.comm,
            {
                "operation": direction,
                "call": str(self.setup.number),
                "tensors": describe(tensors),
                "options": str(self.options) + (f", consistency {c}" if (c := self.conditions.consistency) else ""),
                "records": str(self.record),
                "training": str(self.setup.training),
                "dropout key": str(self.setup.key),
                "extra tensors": describe(self.extras),
                "gradient for the state": str(self._state_needs),
                "more": more,
            },
        )
        with self.conditions.layer_random.preserved(tensors[0].device), graphs_kept(), _own_graphs():
            with recorder.span(direction, iterations=self.options.iterations(direction)):
                yield
        self.comm.synchronize()  # the script may wait for the GPU next, and nothing limits that wait
        self.stats.seconds[direction] += time.perf_counter() - started


def _own_graphs() -> AbstractContextManager[object]:
    """Keeps what layers save for the stack's backward from a checkpoint around the stack.

    It would run the whole part of the model again, with its exchanges, when one rank asks for it.
    """
    if not in_checkpoint():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class SolveFunction(torch.autograd.Function):
    """A pass as one node of autograd's graph: its inputs are the state, the extra tensors and the parameters."""

    @staticmethod
    def forward(ctx: Any, solve_pass: SolvePass, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.solve_pass = solve_pass
        outputs = solve_pass.forward()
        # A layer may hand an input through, or return a part of something; an output of this node has to be its own.
        inputs = {t.data_ptr() for t in solve_pass.state.tensors}
        outputs = tuple(t.clone() if t.data_ptr() in inputs or t._is_view() else t for t in outputs)
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point() or not solve_pass.record))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; torch would take the gradients for constants
            raise RuntimeError(
                "a LayerParallel stack has no second derivatives: create_graph=True (gradient penalties, double "
                "backward) cannot go through it; call the layers one after the other for that"
            )
        return (None, None, *ctx.solve_pass.backward(grads, ctx.needs_input_grad[2:]))
