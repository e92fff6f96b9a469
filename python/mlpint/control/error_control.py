"""Error control: the solver's options follow the error that they are measured to make (arXiv 2601.09026, 3.2.3)."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from ..comm.agreement import agree
from ..errors import TrainingError
from ..layers.consistency import check_weight, intervals_of
from ..mgrit.options import MGRIT
from ..parallel.layer_parallel import LayerParallel
from .decision import Decision
from .diagnosis import first_not_finite, gradients_not_finite
from .gauges import Gauge, GradientGauge, ResidualGauge
from .ladder import default_ladder
from .measurement import Measurement
from .policy import Check, Conclusion, Policy, PolicyState
from .rehearsal import Rehearsal

_log = logging.getLogger(__name__)
DEFAULT_TARGET = {"gradient": 0.95, "residual": 1.0}  # by measure: smallest cosine, largest convergence factor
_EARLY = (8, 4, 2)  # parts of the first period after which there is a check too
_PARTS = (0, 0.03, 0.1, 0.3, 1, 3)  # of the consistency term's weight at first: those to choose from
_POOR = 0.5  # cosine of a first check, below which the model itself is to blame
_POOR_START = (
    "the first check finds poor gradients (%s): layers that change their state much make poor coarse models. Pre-LN "
    "blocks, residual branches that begin small (the last matrix of each scaled by 1 / sqrt(2 layers)) and the "
    "consistency term help; until then exact sweeps may be taken"
)
_SOON = 4  # the part of a period after which a change of the consistency term is looked at


class ErrorControl:
    """Watches a stack's error during training and changes ``blocks.options`` between steps. Collective.

    One call a step, after the backward and before the optimiser::

        control = ErrorControl(blocks, every=200)
        for inputs, targets in batches:
            loss = loss_of(model(inputs), targets)
            loss.backward()
            if not control.step(loss, lambda: loss_of(model(inputs), targets)).skip:
                optimizer.step()
            optimizer.zero_grad()

    On the first step (or after ``start``) and every so many steps the batch is gone through again, under other options;
    before the second of these checks also after an eighth, a quarter and half as many, since untrained networks change
    fast. ``.grad`` is left alone, and the layers draw the random numbers that they drew in the step. Where microbatches
    are accumulated, it is enough to compute the last one's loss again.

    If the options in use miss the target, the next rungs of the ladder are measured on the same batch, now against the
    exact sweep, and the first that meets it is taken. If they meet it with a margin, the rung below is tried; after
    ``patience`` checks in a row that it passed with the margin, it is taken, or one further down that passes as well.
    Where it has to be left again soon, that number doubles until a cheaper rung lasts.

    Measures:

    - ``"gradient"``: cosine, and relative error if ``max_error`` is given, of the stack's gradient against that of one
      more iteration in both directions. Where iterations converge slowly or not at all (the decision's convergence
      factors tell) that one is wrong too, and what is measured may be too good or too bad. ``reference="exact"``
      compares with the exact sweep at each check, at the price of a serial pass.
    - ``"residual"``: the paper's rule. Iterations are doubled and the convergence factor of the last one, the larger of
      both directions, must not exceed the target. It says whether iterations help, not how wrong the gradient is.

    Where ``consistency`` gives weights of the consistency term (:class:`LayerParallel`), the term's weight is the first
    lever, since it makes the cheapest options right and costs no evaluation. If these miss the target by little, or are
    near to that while the coarse model's error grows, the next larger weight is taken and nothing else changes; if they
    miss it by far, options climb too until the larger weight has acted. Once the cheapest options meet the target with
    the margin, the weight is lowered as options are, after ``patience`` checks. After a change there is a check within
    a quarter of the period.

    A step whose loss or gradients are not finite on any rank is to be skipped on all. If the exact sweep's are finite
    on that batch, the solver is at fault and the options climb at once; otherwise the step is only counted, and after
    ``skip_limit`` in a row training ends with an error that names the layer.

    In a mesh of replicas all of them take the same decisions: cosine and error are those of the gradients of all
    replicas' batches taken together, convergence factors the largest. Call :func:`mlpint.average_gradients` before.

    Args:
        blocks: the stack.

    Keyword args:
        measure: ``"gradient"`` or ``"residual"``.
        target: smallest cosine, 0.95 by default; or largest convergence factor, 1 by default.
        every: steps between checks. A check takes the time of 3 to 4 steps.
        start: steps before the first check. An untrained network's coarse model may be poor for some steps alone, until
            the consistency term or an operator that learns has acted; who knows that spares exact steps by it.
        ladder: options from cheap to exact, the stack's among them; by default :func:`default_ladder` of the stack's.
            Operators, cfactor and levels may differ from rung to rung. An operator that learns and is not in use
            learns from two passes before it is measured.
        consistency: weights of the consistency term, ascending, the stack's among them; ``"auto"``: 0 and .03, .1, .3,
            1 and 3 times the stack's; None leaves ``blocks.consistency`` alone. Control sets it after a check. Who
            accumulates gradients over m passes sets it to :attr:`consistency` / m himself before them.
        max_error: largest ||g - g_ref|| / ||g_ref||, beside the cosine.
        reference: ``"finer"`` or ``"exact"``.
        margin: fraction of what the target allows (1 - cosine, convergence factor) that must be to spare for a cheaper
            rung.
        patience: checks in a row that a cheaper rung has to pass, at first.
        skip_limit: steps in a row that are not finite, after which training ends.

    Attributes:
        ladder: the rungs.
        weights: those of the consistency term; empty where control leaves it alone.
        history: decisions of checks and of skipped steps.

    Raises:
        ValueError: arguments out of range, a ladder that the stack's ranks or layout do not allow or that the stack's
            options are no rung of, ranks that disagree.
    """

    def __init__(
        self,
        blocks: LayerParallel,
        *,
        measure: Literal["gradient", "residual"] = "gradient",
        target: float | None = None,
        every: int = 200,
        start: int = 0,
        ladder: Sequence[MGRIT] | None = None,
        consistency: Sequence[float] | Literal["auto"] | None = None,
        max_error: float | None = None,
        reference: Literal["finer", "exact"] = "finer",
        margin: float = 0.3,
        patience: int = 2,
        skip_limit: int = 5,
    ) -> None:
        if not isinstance(blocks, LayerParallel):
            raise TypeError(f"blocks must be an mlpint.LayerParallel, got {type(blocks).__name__}")
        self.blocks, self.measure, self.max_error, self.reference = blocks, measure, max_error, reference
        self.target = DEFAULT_TARGET.get(measure, 0.0) if target is None else target
        blocks.looked_after()
        self.every, self.start, self.margin, self.patience, self.skip_limit = every, start, margin, patience, skip_limit
        self._check_arguments()
        self.ladder = self._checked_ladder(ladder)
        self.weights = self._checked_weights(consistency)
        names = "measure target every start max_error reference margin patience skip_limit ladder weights".split()
        blocks.comm.world.vote({name: str(getattr(self, name)) for name in names}, "ErrorControl")
        self.history: list[Decision] = []
        self.steps = 0
        self._given = self.weights.index(blocks.consistency) if self.weights else 0
        self._state = PolicyState(wanted=patience, weight=self._given)
        self._check_at: int | None = None  # steps after which there is a check beside the periodic ones
        self._passes = 1
        self._checking = self._before = 0.0  # seconds: of checks; of training before a resumption
        self._started = time.perf_counter()

    def _check_arguments(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise ValueError(f"ErrorControl: {name} = {getattr(self, name)!r}: must be {allowed}")

        for name, choices in (("measure", ("gradient", "residual")), ("reference", ("finer", "exact"))):
            if getattr(self, name) not in choices:
                refuse(name, " or ".join(choices))
        for name in ("every", "patience", "skip_limit"):
            if not _is_number(getattr(self, name), int) or getattr(self, name) < 1:
                refuse(name, "an integer of at least 1")
        if not _is_number(self.start, int) or self.start < 0:
            refuse("start", "an integer of at least 0")
        if not _is_number(self.margin) or not 0 <= self.margin < 1:
            refuse("margin", "in [0, 1)")
        if not _is_number(self.target) or not 0 < self.target < (1 if self.measure == "gradient" else math.inf):
            refuse("target", "in (0, 1), a cosine" if self.measure == "gradient" else "positive, a convergence factor")
        if self.measure == "residual" and (self.max_error is not None or self.reference != "finer"):
            refuse("measure", "gradient where max_error or reference are given")
        if self.max_error is not None and (not _is_number(self.max_error) or not self.max_error > 0):
            refuse("max_error", "positive, or None")
        count = sum(len(ps) for ps in self.blocks.store.trainable_parameters().values())
        if not self.blocks.comm.transport.control.sum(float(count)):
            raise ValueError("ErrorControl: the stack has no parameter that requires a gradient")

    def _checked_ladder(self, ladder: Sequence[MGRIT] | None) -> tuple[MGRIT, ...]:
        blocks, options = self.blocks, self.blocks.options
        if ladder is None:
            if options.exact:
                raise ValueError("ErrorControl: the stack is exact; give a ladder of options from cheap to exact")
            ladder = default_ladder(options, blocks.layout.depth)
        ladder = tuple(ladder)
        for rung in ladder:
            if not isinstance(rung, MGRIT):
                raise TypeError(f"ErrorControl: the ladder holds a {type(rung).__name__}, not only mlpint.MGRIT")
        if len(ladder) < 2 or len(set(ladder)) < len(ladder):
            raise ValueError(f"ErrorControl: the ladder has {len(ladder)} rungs: must be at least 2, all different")
        if options not in ladder:
            raise ValueError(f"ErrorControl: the stack's options, {options}, are no rung of the ladder")
        try:
            for rung in ladder:
                blocks.options = rung
                for direction in ("forward", "backward"):
                    blocks.solver(direction)
        except ValueError as error:
            raise ValueError(f"ErrorControl: rung {rung} of the ladder: {error}") from None
        finally:
            blocks.options = options
        return ladder

    def _checked_weights(self, weights: Sequence[float] | Literal["auto"] | None) -> tuple[float, ...]:
        if weights is None:
            return ()
        present = self.blocks.consistency
        if weights == "auto" and not present:
            raise ValueError("ErrorControl: consistency = 'auto': the stack has no consistency term to begin with")
        found = tuple(part * present for part in _PARTS) if weights == "auto" else tuple(weights)
        for weight in found:
            check_weight(weight)
        if len(found) < 2 or list(found) != sorted(set(found)):
            raise ValueError(f"ErrorControl: consistency = {list(found)}: must be at least 2 weights, ascending")
        if present not in found:
            raise ValueError(f"ErrorControl: the stack's consistency, {present:g}, is not among {list(found)}")
        for rung in self.ladder:
            try:
                intervals_of(self.blocks.layout, rung)
            except ValueError as error:
                raise ValueError(f"ErrorControl: consistency with rung {rung} of the ladder: {error}") from None
        return found

    # --- one step ----------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """The rules by which the next check decides."""
        rules = self.measure, self.target, self.max_error, self.margin, self.patience
        return Policy(self.ladder, *rules, self.weights, self._given)

    @property
    def consistency(self) -> float:
        """The weight of the consistency term that the next step is to have."""
        return self.weights[self._state.weight] if self.weights else self.blocks.consistency

    @property
    def skipped(self) -> int:
        """Steps that were not finite so far."""
        return self._state.skipped

    @property
    def check_due(self) -> bool:
        """Whether the coming :meth:`step` will check."""
        if self.steps <= self.start:
            return self.steps == self.start
        early = _EARLY if self.every >= _EARLY[0] else ()
        return self.steps % self.every == 0 or self.steps in [self.every // part for part in early] + [self._check_at]

    @property
    def share(self) -> float:
        """Share of the time since the start that went into checks on this rank."""
        return self._checking / max(self._before + time.perf_counter() - self._started, 1e-9)

    def step(self, loss: torch.Tensor | float, again: Callable[[], torch.Tensor]) -> Decision:
        """After the backward, before the optimiser; on every rank alike.

        Args:
            loss: of the step, a scalar.
            again: computes it again on the same batch, as a tensor, without a backward; called on checks alone.

        Returns:
            What was decided; ``skip`` if the optimiser must not step.

        Raises:
            TrainingError: a RuntimeError; too many steps in a row were not finite.
            ValueError: the stack's options are no rung of the ladder.
        """
        if not callable(again):
            raise TypeError(f"again must be a function that computes the loss, got {type(again).__name__}")
        if self.blocks.options not in self.ladder:
            raise ValueError(
                f"the stack's options, {self.blocks.options}, are no rung of the ladder; set one of control.ladder"
            )
        value = loss.detach() if isinstance(loss, torch.Tensor) else torch.as_tensor(loss)
        agree(self.blocks.comm, {"operation": "ErrorControl.step", "step": str(self.steps)})
        due, finite = self.check_due, self._is_finite(value)
        if finite and not due:
            decision = Decision(self.steps + 1, "none", self.blocks.options, self.blocks.options)
        else:
            where = "" if finite else gradients_not_finite(self.blocks)
            if where and self.blocks.comm.world.rank == 0:
                _log.warning("step %d: %s", self.steps + 1, where)
            device = value.device if isinstance(loss, torch.Tensor) else self.blocks.comm.device
            rehearsal = Rehearsal(self.blocks, again, device, self._passes)
            decision = self._check(rehearsal, finite)
            self._passes = rehearsal.passes
            if decision.action == "skip" and self._state.skipped_in_a_row >= self.skip_limit:
                first = first_not_finite(rehearsal)
                raise TrainingError(
                    f"{self._state.skipped_in_a_row} steps in a row were not finite, the last one's loss was "
                    f"{float(value)}: {where + '; ' if where else ''}{first}; lower the learning rate, or look at "
                    "the data of this step"
                )
        if finite:
            self._state = dataclasses.replace(self._state, skipped_in_a_row=0)
        self.steps += 1
        return decision

    def _check(self, rehearsal: Rehearsal, finite: bool) -> Decision:
        """Carries out what the policy asks for, then what it decides."""
        started, options, policy = time.perf_counter(), self.blocks.options, self.policy
        if finite:
            error = self.blocks.relative_error() if self.weights and self.blocks.consistency else None
            check = policy.check(self._state, self.steps + 1, options, error and float(f"{error:.6g}"))
        else:
            check = policy.check_not_finite(self._state, self.steps + 1, options)
        conclusion = _carried_out(check, self._gauge(rehearsal))
        decision = dataclasses.replace(conclusion.decision, seconds=time.perf_counter() - started)
        changed = conclusion.state.weight != self._state.weight
        self._state, self.blocks.options = conclusion.state, decision.after
        if self.weights:
            self.blocks.consistency = self.consistency
        if changed or self.weights and 0 < self._state.good < self._state.wanted:
            self._check_at = self.steps + max(self.every // _SOON, 1)
        self._checking += decision.seconds
        self.history.append(decision)
        if self.blocks.comm.world.rank == 0:
            if conclusion.warning:
                _log.warning("%s", conclusion.warning)
            measured = decision.measured
            cosine = None if measured is None else measured.cosine
            if len(self.history) == 1 and cosine is not None and cosine < _POOR:
                _log.warning(_POOR_START, measured)
            _log.log(logging.WARNING if decision.skip else logging.INFO, "%s", decision)
        return decision

    def _is_finite(self, loss: torch.Tensor) -> bool:
        gradients = [p.grad for p in self.blocks.parameters() if p.grad is not None]
        finite = bool(loss.isfinite().all())
        if finite and gradients:
            norms = torch._foreach_norm(gradients)  # of this rank alone, unlike those that torch clips by
            finite = bool(torch.stack([norm.double() for norm in norms]).isfinite().all())
        comm = self.blocks.comm.world
        return comm.size == 1 and finite or comm.size > 1 and not comm.transport.control.sum(float(not finite))

    def _gauge(self, rehearsal: Rehearsal) -> Gauge:
        if self.measure == "residual":
            return ResidualGauge(rehearsal, self.blocks.options)
        return GradientGauge(rehearsal, self.blocks.options, against_exact=self.reference == "exact")

    # --- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What to go on from; numbers, text and dicts only."""
        return {
            "options": dataclasses.asdict(self.blocks.options),
            "steps": self.steps,
            "check_at": self._check_at,
            **dataclasses.asdict(self._state),
            "checking": self._checking,
            "seconds": self._before + time.perf_counter() - self._started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, with the options of that moment. On every rank alike.

        Raises:
            ValueError: options that are no rung of the ladder, or entries missing.
        """
        state = {"check_at": None, "weight": self._given, "error": None} | state  # of before there was this lever
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"ErrorControl: the state lacks {', '.join(sorted(missing))}")
        options = MGRIT(**state["options"])
        if options not in self.ladder:
            raise ValueError(f"ErrorControl: the state's options, {options}, are no rung of the ladder")
        self.blocks.options = options
        if self.weights and not 0 <= state["weight"] < len(self.weights):
            raise ValueError(f"ErrorControl: the state's weight, number {state['weight']}, is none of {self.weights}")
        self.steps, self._check_at = state["steps"], state["check_at"]
        self._state = PolicyState(**{f.name: state[f.name] for f in dataclasses.fields(PolicyState)})
        self._checking, self._before, self._started = state["checking"], state["seconds"], time.perf_counter()
        if self.weights:
            self.blocks.consistency = self.consistency


def _carried_out(check: Check, gauge: Gauge) -> Conclusion:
    """Measures what the check asks for until it comes to a conclusion."""
    answer: Measurement | None = None
    while True:
        try:
            request = check.send(answer)
        except StopIteration as end:
            return end.value
        answer = gauge.answer(request)


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
