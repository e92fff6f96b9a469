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
    """The rules of climbing and descending; :class:`~mlpint.ErrorControl` says what the fields mean."""

    ladder: tuple[MGRIT, ...]
    measure: Literal["gradient", "residual"]
    target: float
    max_error: float | None
    margin: float
    patience: int

    def check(self, state: PolicyState, step: int, options: MGRIT) -> Check:
        """Decides after a step whose loss and gradients are finite; ``options`` are those in use."""
        measured: Measurement = yield Request("start", options)
        hold = Decision(step, "hold", options, options, f"{measured}", measured)
        if state.descended_since is not None:
            lasted = state.descended_since + 1
            settled = lasted > SETTLED_AFTER
            wanted = self.patience if settled else state.wanted
            state = replace(state, wanted=wanted, descended_since=None if settled else lasted)
        if self.meets(measured):
            return (yield from self._try_below(replace(state, missed_since=None), hold, measured))
        state = replace(state, good=0)
        if state.missed_since is not None and state.missed_since < RETRY_AFTER:
            reason = f"{measured}: misses {self._target}, as do all rungs"
            return Conclusion(replace(hold, reason=reason), replace(state, missed_since=state.missed_since + 1))
        return (yield from self._climb(state, hold))

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
        if state.descended_since is not None:  # the cheaper rung was taken too soon
            wanted = max(self.patience, min(2 * state.wanted, MOST_PATIENCE))
            state = replace(state, wanted=wanted, descended_since=None)
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
