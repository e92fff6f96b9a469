"""What error control decides: figures in, decisions out.

Nothing here runs a pass, knows of ranks or holds a tensor. A check is a generator: it yields a :class:`Request` for
each measurement that it needs, is sent the answer, and returns a :class:`Conclusion`.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..mgrit.options import MGRIT
from .decision import Decision
from .ladder import short_form
from .measurement import Measurement

RETRY_AFTER = 10  # checks after which a ladder that does not reach the target is tried again
SETTLED_AFTER = 10  # checks that a cheaper rung must last not to have been taken too soon
MOST_PATIENCE = 16
MILD = 3  # a miss of at most so many times what the target allows is left to the consistency term alone
GROWN = 1.25  # the coarse model's error over that of the check before, from which on it counts as growing


@dataclass(frozen=True)
class Request:
    """The measurement that a check needs next.

    Kinds: ``"start"`` measures the options in use against the usual reference; ``"sharpen"`` measures them against the
    exact sweep, and the answer is None where that is not finite; ``"measure"`` measures other options against the
    reference of the request before it. A check begins with one of the first two.
    """

    kind: Literal["start", "sharpen", "measure"]
    options: MGRIT


@dataclass(frozen=True, kw_only=True)
class PolicyState:
    """What is remembered from one step to the next."""

    wanted: int  # checks in a row that the rung below has to pass before it is taken
    good: int = 0  # checks in a row that it has passed
    descended_since: int | None = None  # checks since a cheaper rung was taken that has not lasted yet
    missed_since: int | None = None  # checks since the whole ladder was found to miss the target
    weight: int = 0  # place of the consistency term's weight among the policy's
    error: float | None = None  # of the coarse model at the last check
    told: bool = False  # the user knows that no rung meets the target
    skipped: int = 0  # steps that were not finite
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Conclusion:
    """What a check came to; ``warning`` is a line for the user where there is something to warn of."""

    decision: Decision
    state: PolicyState
    warning: str = ""


Check = Generator[Request, Any, Conclusion]  # what is sent is a Measurement; to "sharpen", None is an answer too


@dataclass(frozen=True)
class Policy:
    """The rules of climbing and descending; :class:`~mlpint.ErrorControl` says what the fields mean.

    The weight of the consistency term, where there are ``weights``, is the first lever: it makes cheap options good,
    though only over some steps. It is raised before options climb, and lowered once they are the cheapest.
    """

    ladder: tuple[MGRIT, ...]
    measure: Literal["gradient", "residual"]
    target: float
    max_error: float | None
    margin: float
    patience: int
    weights: tuple[float, ...] = ()  # of the consistency term, ascending; none: it is left alone
    given: int = 0  # the place of the one that training began with

    def check(self, state: PolicyState, step: int, options: MGRIT, error: float | None = None) -> Check:
        """Decides after a step whose loss and gradients are finite; ``options`` are those in use.

        ``error`` is the coarse model's in that step, where there is a consistency term.
        """
        grows = error is not None and state.error is not None and error > GROWN * state.error
        conclusion = yield from self._check(replace(state, error=error), step, options, grows)
        if not self.weights:
            return conclusion
        weights = self.weights[state.weight], self.weights[conclusion.state.weight]
        return replace(conclusion, decision=replace(conclusion.decision, consistency=weights))

    def _check(self, state: PolicyState, step: int, options: MGRIT, grows: bool) -> Check:
        measured: Measurement = yield Request("start", options)
        hold = Decision(step, "hold", options, options, f"{measured}", measured)
        if state.descended_since is not None:
            lasted = state.descended_since + 1
            settled = lasted > SETTLED_AFTER
            wanted = self.patience if settled else state.wanted
            state = replace(state, wanted=wanted, descended_since=None if settled else lasted)
        if self.meets(measured):
            state = replace(state, missed_since=None)
            if self.weights and options == self.ladder[0]:
                return self._weigh(state, hold, measured, grows)
            return (yield from self._try_below(state, hold, measured))
        state = replace(state, good=0)
        heavier = self._heavier(state, hold, measured)
        if heavier is not None and self._misses_mildly(measured):
            return heavier
        if state.missed_since is not None and state.missed_since < RETRY_AFTER:
            reason = f"{measured}: misses {self._target}, as do all rungs"
            conclusion = Conclusion(replace(hold, reason=reason), replace(state, missed_since=state.missed_since + 1))
        else:
            conclusion = yield from self._climb(state, hold)
        exactly = conclusion.decision.measured
        if heavier is None or exactly is None or self.meets(exactly):
            return conclusion
        # Far off: better options for now, and more weight on what makes the cheap ones good.
        return replace(conclusion, state=replace(conclusion.state, weight=max(heavier.state.weight, self.given)))

    def check_not_finite(self, state: PolicyState, step: int, options: MGRIT) -> Check:
        """Decides after a step that is not finite. Where the exact sweep is, the solver is at fault."""
        row = state.skipped_in_a_row + 1
        state = replace(state, good=0, skipped=state.skipped + 1, skipped_in_a_row=row)
        skip = Decision(step, "skip", options, options, f"not finite; skipped, {row} in a row", skip=True)
        if options.exact:
            return Conclusion(skip, state)
        conclusion = yield from self._climb(state, Decision(step, "hold", options, options))
        climbs = conclusion.decision.action == "climb"
        return replace(conclusion, decision=replace(conclusion.decision, skip=True) if climbs else skip)

    def meets(self, m: Measurement, margin: float = 0.0) -> bool:
        """Whether the target is met, with this fraction of what it allows to spare."""
        if self.measure == "residual":
            return m.largest_factor <= self.target * (1 - margin)
        assert m.cosine is not None and m.error is not None
        right = 1 - m.cosine <= (1 - self.target) * (1 - margin)
        return right and (self.max_error is None or m.error <= self.max_error * (1 - margin))

    def quality(self, m: Measurement) -> float:
        """Larger is better; minus infinity where nothing could be measured."""
        quality = -m.largest_factor if self.measure == "residual" else m.cosine
        return -math.inf if quality is None or math.isnan(quality) else quality

    def _misses_mildly(self, m: Measurement) -> bool:
        return self.meets(m, margin=1 - MILD)

    def _left_again(self, state: PolicyState) -> PolicyState:
        """Asks for more patience where the cheaper rung, or the smaller weight, was taken too soon."""
        if state.descended_since is None:
            return state
        wanted = max(self.patience, min(2 * state.wanted, MOST_PATIENCE))
        return replace(state, wanted=wanted, descended_since=None)

    def _heavier(self, state: PolicyState, hold: Decision, measured: Measurement) -> Conclusion | None:
        """More weight on the consistency term; None where there is no more, or the term had no step to act in."""
        if hold.step == 1 or state.weight + 1 >= len(self.weights):
            return None
        state = replace(self._left_again(state), weight=state.weight + 1, good=0)
        return Conclusion(replace(hold, action="raise", reason=f"{measured}: misses {self._target}"), state)

    def _weigh(self, state: PolicyState, hold: Decision, measured: Measurement, grows: bool) -> Conclusion:
        """The cheapest options meet the target: whether with less weight on the consistency term, or soon not."""
        if not self.meets(measured, self.margin):
            state = replace(state, good=0)
            heavier = self._heavier(state, hold, measured) if grows else None
            if heavier is None:
                return Conclusion(hold, state)
            reason = f"{measured}: without the margin, and the coarse model's error grows"
            return replace(heavier, decision=replace(heavier.decision, reason=reason))
        good = state.good + 1
        if good < state.wanted or not state.weight:
            return Conclusion(hold, replace(state, good=min(good, state.wanted)))
        state = replace(state, weight=state.weight - 1, good=0, descended_since=0)
        return Conclusion(replace(hold, action="lower", reason=f"good enough {good} times: {measured}"), state)

    @property
    def _target(self) -> str:
        if self.measure == "residual":
            return f"convergence factor {self.target:g}"
        return f"cosine {self.target:g}" + (f" and error {self.max_error:g}" if self.max_error is not None else "")

    def _try_below(self, state: PolicyState, hold: Decision, measured: Measurement) -> Check:
        """The options in use meet the target: descends where cheaper ones have done so often enough."""
        place = self.ladder.index(hold.before)
        if not place or not self.meets(measured, self.margin):
            return Conclusion(hold, replace(state, good=0))
        below: Measurement = yield Request("measure", self.ladder[place - 1])
        passed = self.meets(below, self.margin)
        state = replace(state, good=state.good + 1 if passed else 0)
        tried = [below]
        if state.good < state.wanted:
            verdict = f"good {state.good} of {state.wanted} times" if passed else "not good enough"
            reason = f"{measured}; {short_form(below.options)}: {below}, {verdict}"
            return Conclusion(replace(hold, reason=reason, tried=(below,)), state)
        lowest = below
        for rung in reversed(self.ladder[: place - 1]):
            tried.append((yield Request("measure", rung)))
            if not self.meets(tried[-1], self.margin):
                break
            lowest = tried[-1]
        reason = f"good enough: {lowest}"
        descend = replace(hold, action="descend", after=lowest.options, reason=reason, tried=tuple(tried))
        return Conclusion(descend, replace(state, good=0, descended_since=0))

    def _climb(self, state: PolicyState, hold: Decision) -> Check:
        """The options in use miss the target: finds the first rung above that meets it, else takes the best."""
        estimate, options = hold.measured, hold.before
        measured: Measurement | None = yield Request("sharpen", options)
        if measured is None:
            return Conclusion(replace(hold, reason="not finite under the exact sweep either"), state)
        hold = replace(hold, measured=measured)
        if estimate is not None and self.meets(measured):
            return Conclusion(replace(hold, reason=f"{estimate}: misses {self._target}; {measured}: does not"), state)
        miss = "not finite, but the exact sweep is" if estimate is None else f"{measured}: misses {self._target}"
        state = self._left_again(state)
        tried: list[Measurement] = []
        for rung in self.ladder[self.ladder.index(options) + 1 :]:
            tried.append((yield Request("measure", rung)))
            if self.meets(tried[-1]):
                reason = f"{miss}; now {tried[-1]}"
                climb = replace(hold, action="climb", after=rung, reason=reason, tried=tuple(tried))
                return Conclusion(climb, replace(state, missed_since=None))
        best = max((measured, *tried), key=self.quality)
        action: Literal["hold", "climb"] = "hold" if best.options == options else "climb"
        reason = f"{miss}, as do all rungs; the best: {best}"
        decision = replace(hold, action=action, after=best.options, reason=reason, tried=tuple(tried))
        warning = f"no rung of the ladder meets {self._target}; the best, {short_form(best.options)}: {best}"
        return Conclusion(decision, replace(state, missed_since=0, told=True), "" if state.told else warning)
