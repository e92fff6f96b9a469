"""The policy as a table: what it remembers and is told, what it asks for and decides."""

import dataclasses
import math
from typing import Any

import pytest

from mlpint import MGRIT
from mlpint.control.measurement import Measurement
from mlpint.control.policy import MOST_PATIENCE, RETRY_AFTER, SETTLED_AFTER, Policy, PolicyState, Request

LADDER = (MGRIT(2, 4, 1, 1), MGRIT(2, 4, 2, 1), MGRIT(2, 4, 2, 2), MGRIT(1))
GRADIENT = Policy(LADDER, "gradient", target=0.9, max_error=None, margin=0.5, patience=2)  # .95 has the margin
RESIDUAL = Policy(LADDER, "residual", target=0.8, max_error=None, margin=0.5, patience=2)  # .4 has the margin
WEIGHING = dataclasses.replace(GRADIENT, weights=(0.0, 0.1, 1.0, 10.0), given=2)  # .7 misses by little, .69 by far
WITH_ERROR = dataclasses.replace(GRADIENT, max_error=0.2)
NAN = math.nan
STEP = 7


def cosine(value, error=0.1):
    return {"cosine": value, "error": error}


def rho(forward, backward=0.1):
    return {"convergence_factor": {"forward": forward, "backward": backward}}


GOOD, FAIR, BAD, NOTHING, EXACT = cosine(0.99), cosine(0.92), cosine(0.5), cosine(NAN, NAN), cosine(1.0, 0.0)


@dataclasses.dataclass
class Row:
    """One check, of options that are given by their place on the ladder."""

    name: str
    place: int  # of the options in use
    answers: dict[Any, dict | None]  # "start", "sharpen" or the place of another rung: what is measured, in this order
    action: str
    after: int
    changed: dict = dataclasses.field(default_factory=dict)  # of what is remembered
    _: dataclasses.KW_ONLY
    before: dict = dataclasses.field(default_factory=dict)  # what is remembered, where it is not as at the start
    reason: str = ""  # a part of it
    warning: str = ""
    policy: Policy = GRADIENT
    finite: bool = True
    error: float | None = None  # of the coarse model


MEETS_THE_TARGET = [
    Row("without the margin", 1, {"start": FAIR}, "hold", 1, {"good": 0}, before={"good": 1}, reason="cosine 0.9200"),
    Row("on the lowest rung", 0, {"start": GOOD}, "hold", 0, reason="gradient cosine 0.9900, error 0.1"),
    Row("after all missed it", 0, {"start": FAIR}, "hold", 0, {"missed_since": None}, before={"missed_since": 3}),
    Row(
        "the rung below has the margin for the first time",
        *(1, {"start": GOOD, 0: cosine(0.951)}, "hold", 1, {"good": 1}),
        reason="cosine 0.9900, error 0.1; (1,1) cf 4: gradient cosine 0.9510, error 0.1, good 1 of 2 times",
    ),
    Row(
        "the rung below lacks the margin",
        *(1, {"start": GOOD, 0: cosine(0.949)}, "hold", 1, {"good": 0}),
        before={"good": 1},
        reason="; (1,1) cf 4: gradient cosine 0.9490, error 0.1, not good enough",
    ),
    Row("the rung below fails", 1, {"start": GOOD, 0: NOTHING}, "hold", 1, {"good": 0}, before={"good": 1}),
    Row(
        "the rung below has been good often enough",
        *(1, {"start": GOOD, 0: GOOD}, "descend", 0, {"good": 0, "descended_since": 0}),
        before={"good": 1},
        reason="good enough: gradient cosine 0.9900",
    ),
    Row(
        "several rungs down",
        *(3, {"start": EXACT, 2: GOOD, 1: cosine(0.97), 0: FAIR}, "descend", 1, {"good": 0, "descended_since": 0}),
        before={"good": 1},
        reason="good enough: gradient cosine 0.9700",
    ),
    Row(
        "down the whole ladder",
        *(3, {"start": EXACT, 2: GOOD, 1: GOOD, 0: GOOD}, "descend", 0, {"good": 0, "descended_since": 0}),
        before={"good": 1},
    ),
    Row(
        "one rung down, the next is bad",
        *(2, {"start": GOOD, 1: GOOD, 0: BAD}, "descend", 1, {"good": 0, "descended_since": 0}),
        before={"good": 1},
    ),
    Row(
        "more patience is wanted than at first",
        *(1, {"start": GOOD, 0: GOOD}, "hold", 1, {"good": 3}),
        before={"good": 2, "wanted": 4},
        reason="good 3 of 4 times",
    ),
]

A_CHEAPER_RUNG_WAS_TAKEN = [
    Row("lasts so far", 0, {"start": GOOD}, "hold", 0, {"descended_since": 4}, before={"descended_since": 3}),
    Row(
        "has nearly lasted",
        *(0, {"start": GOOD}, "hold", 0, {"descended_since": SETTLED_AFTER}),
        before={"descended_since": SETTLED_AFTER - 1, "wanted": 8},
    ),
    Row(
        "has lasted",
        *(0, {"start": GOOD}, "hold", 0, {"descended_since": None, "wanted": 2}),
        before={"descended_since": SETTLED_AFTER, "wanted": 8},
    ),
    Row(
        "is left at once",
        *(0, {"start": BAD, "sharpen": BAD, 1: FAIR}, "climb", 1, {"descended_since": None, "wanted": 4}),
        before={"descended_since": 0},
    ),
    Row(
        "is left when it has nearly lasted",
        *(0, {"start": BAD, "sharpen": BAD, 1: FAIR}, "climb", 1, {"descended_since": None, "wanted": 4}),
        before={"descended_since": SETTLED_AFTER - 1},
    ),
    Row(
        "is left when it has lasted",
        *(0, {"start": BAD, "sharpen": BAD, 1: FAIR}, "climb", 1, {"descended_since": None, "wanted": 2}),
        before={"descended_since": SETTLED_AFTER, "wanted": 4},
    ),
    Row(
        "patience has an end",
        *(0, {"start": BAD, "sharpen": BAD, 1: FAIR}, "climb", 1, {"descended_since": None, "wanted": MOST_PATIENCE}),
        before={"descended_since": 0, "wanted": MOST_PATIENCE - 1},
    ),
    Row(
        "but is never less than asked for",
        *(0, {"start": BAD, "sharpen": BAD, 1: FAIR}, "climb", 1, {"descended_since": None}),
        before={"descended_since": 0},
        policy=dataclasses.replace(GRADIENT, patience=MOST_PATIENCE + 4),
    ),
]

MISSES_THE_TARGET = [
    Row(
        "the next rung meets it",
        *(0, {"start": BAD, "sharpen": cosine(0.6), 1: cosine(0.901)}, "climb", 1, {"good": 0}),
        before={"good": 1},
        reason="gradient cosine 0.6000, error 0.1: misses cosine 0.9; now gradient cosine 0.9010, error 0.1",
    ),
    Row("a later rung does", 0, {"start": BAD, "sharpen": BAD, 1: NOTHING, 2: cosine(0.899), 3: EXACT}, "climb", 3),
    Row(
        "the estimate was too bad",
        *(1, {"start": BAD, "sharpen": FAIR}, "hold", 1, {"good": 0, "descended_since": 3}),
        before={"good": 1, "descended_since": 2},
        reason="gradient cosine 0.5000, error 0.1: misses cosine 0.9; gradient cosine 0.9200, error 0.1: does not",
    ),
    Row(
        "neither is the exact sweep finite",
        *(0, {"start": NOTHING, "sharpen": None}, "hold", 0, {"descended_since": 3}),
        before={"descended_since": 2},
        reason="not finite under the exact sweep either",
    ),
    Row(
        "the estimate is not finite, the exact sweep is",
        *(0, {"start": NOTHING, "sharpen": NOTHING, 1: GOOD}, "climb", 1),
        reason="gradient cosine nan, error nan: misses cosine 0.9; now gradient cosine 0.9900, error 0.1",
    ),
    Row(
        "all rungs miss it, the best is above",
        *(1, {"start": BAD, "sharpen": BAD, 2: cosine(0.7), 3: cosine(0.6)}, "climb", 2),
        {"missed_since": 0, "told": True},
        reason="0.1: misses cosine 0.9, as do all rungs; the best: gradient cosine 0.7000, error 0.1",
        warning="no rung of the ladder meets cosine 0.9; the best, (2,2) cf 4: gradient cosine 0.7000, error 0.1",
    ),
    Row(
        "all rungs still miss it, the best is in use",
        *(1, {"start": BAD, "sharpen": cosine(0.7), 2: NOTHING, 3: BAD}, "hold", 1, {"missed_since": 0}),
        before={"missed_since": RETRY_AFTER, "told": True},
        reason="as do all rungs; the best: gradient cosine 0.7000",
    ),
    Row(
        "on the highest rung",
        *(3, {"start": BAD, "sharpen": BAD}, "hold", 3, {"missed_since": 0}),
        before={"told": True},
    ),
    Row(
        "as all rungs have not long ago",
        *(1, {"start": BAD}, "hold", 1, {"missed_since": RETRY_AFTER, "good": 0}),
        before={"missed_since": RETRY_AFTER - 1, "good": 1},
        reason="gradient cosine 0.5000, error 0.1: misses cosine 0.9, as do all rungs",
    ),
    Row(
        "as all rungs have long ago",
        *(1, {"start": BAD, "sharpen": BAD, 2: FAIR}, "climb", 2, {"missed_since": None}),
        before={"missed_since": RETRY_AFTER},
        reason="now gradient cosine 0.9200",
    ),
]

THE_ERROR_IS_LIMITED_TOO = [
    Row(
        "the cosine meets the target, the error does not",
        *(0, {"start": cosine(0.99, 0.3), "sharpen": cosine(0.99, 0.21), 1: cosine(0.99, 0.2)}, "climb", 1),
        reason="misses cosine 0.9 and error 0.2; now gradient cosine 0.9900, error 0.2",
        policy=WITH_ERROR,
    ),
    Row("the error lacks the margin", 1, {"start": cosine(0.99, 0.11)}, "hold", 1, policy=WITH_ERROR),
    Row("the error has the margin", 1, {"start": GOOD, 0: GOOD}, "hold", 1, {"good": 1}, policy=WITH_ERROR),
]

THE_RESIDUAL_IS_MEASURED = [
    Row("it converges", 0, {"start": rho(0.7)}, "hold", 0, reason="rho forward 0.7, rho backward 0.1", policy=RESIDUAL),
    Row(
        "one direction does not",
        *(0, {"start": rho(0.1, 0.9), "sharpen": rho(0.1, 0.9), 1: rho(0.8)}, "climb", 1),
        reason="rho backward 0.9: misses convergence factor 0.8; now rho forward 0.8, rho backward 0.1",
        policy=RESIDUAL,
    ),
    Row(
        "a factor that is no number counts as infinite",
        *(0, {"start": rho(NAN), "sharpen": rho(NAN), 1: rho(0.2, NAN), 2: rho(3.0), 3: {}}, "climb", 3),
        reason="now nothing to iterate",
        policy=RESIDUAL,
    ),
    Row(
        "the smallest of the larger factors is the best",
        *(0, {"start": rho(0.9, 4.0), "sharpen": rho(0.9, 4.0), 1: rho(3.0), 2: rho(2.0, NAN)}, "climb", 1),
        {"missed_since": 0, "told": True},
        reason="as do all rungs; the best: rho forward 3, rho backward 0.1",
        warning="no rung of the ladder meets convergence factor 0.8; "
        "the best, (2,1) cf 4: rho forward 3, rho backward 0.1",
        policy=dataclasses.replace(RESIDUAL, ladder=LADDER[:3]),
    ),
    Row(
        "the exact sweep has nothing to iterate",
        *(3, {"start": {}, 2: rho(0.4), 1: rho(0.41)}, "descend", 2, {"good": 0, "descended_since": 0}),
        before={"good": 1},
        reason="good enough: rho forward 0.4, rho backward 0.1",
        policy=RESIDUAL,
    ),
]

THE_STEP_IS_NOT_FINITE = [
    Row(
        "neither is the exact sweep",
        *(0, {"sharpen": None}, "skip", 0, {"good": 0, "skipped": 5, "skipped_in_a_row": 2}),
        before={"good": 1, "skipped": 4, "skipped_in_a_row": 1},
        reason="not finite; skipped, 2 in a row",
        finite=False,
    ),
    Row("the exact sweep is in use", 3, {}, "skip", 3, {"skipped": 1, "skipped_in_a_row": 1}, finite=False),
    Row(
        "the solver is at fault",
        *(0, {"sharpen": NOTHING, 1: NOTHING, 2: FAIR}, "climb", 2),
        {"skipped": 1, "skipped_in_a_row": 1, "descended_since": None, "missed_since": None, "wanted": 4},
        before={"descended_since": 1, "missed_since": 1},
        reason="not finite, but the exact sweep is; now gradient cosine 0.9200, error 0.1",
        finite=False,
    ),
    Row(
        "the solver is at fault only a little",
        *(2, {"sharpen": GOOD, 3: BAD}, "skip", 2),
        {"skipped": 1, "skipped_in_a_row": 1, "missed_since": 0, "told": True},
        reason="not finite; skipped, 1 in a row",
        warning="no rung of the ladder meets cosine 0.9; the best, (2,2) cf 4: gradient cosine 0.9900, error 0.1",
        finite=False,
    ),
]

THE_CONSISTENCY_TERM_IS_THE_FIRST_LEVER = [
    Row(
        "a small miss raises the weight alone",
        *(0, {"start": cosine(0.701)}, "raise", 0, {"weight": 2, "good": 0}),
        before={"weight": 1, "good": 1},
        reason="gradient cosine 0.7010, error 0.1: misses cosine 0.9",
    ),
    Row("whatever the options", 2, {"start": cosine(0.701)}, "raise", 2, {"weight": 2}, before={"weight": 1}),
    Row(
        "a large miss raises both, the weight at least to the first one",
        *(0, {"start": cosine(0.699), "sharpen": BAD, 1: FAIR}, "climb", 1, {"weight": 2}),
        before={"weight": 0},
    ),
    Row(
        "a miss that was none raises nothing",
        *(0, {"start": BAD, "sharpen": FAIR}, "hold", 0, {}),
        before={"weight": 1},
    ),
    Row(
        "where all rungs have missed it not long ago the weight is still raised",
        *(1, {"start": BAD}, "hold", 1, {"missed_since": 2, "weight": 3}),
        before={"missed_since": 1, "weight": 2},
    ),
    Row(
        "the largest weight leaves it to the options",
        *(0, {"start": cosine(0.8), "sharpen": cosine(0.8), 1: FAIR}, "climb", 1, {}),
        before={"weight": 3},
    ),
    Row(
        "a weight that was lowered too soon",
        *(0, {"start": cosine(0.8)}, "raise", 0, {"weight": 2, "wanted": 4, "descended_since": None}),
        before={"weight": 1, "descended_since": 1},
    ),
    Row(
        "the margin for the first time", 0, {"start": GOOD}, "hold", 0, {"good": 1, "error": 0.3},
        before={"weight": 2, "error": 0.1}, error=0.3,
    ),
    Row(
        "the margin often enough lowers the weight",
        *(0, {"start": GOOD}, "lower", 0, {"good": 0, "weight": 1, "descended_since": 0}),
        before={"weight": 2, "good": 1},
        reason="good enough 2 times: gradient cosine 0.9900",
    ),
    Row("there is no weight left", 0, {"start": GOOD}, "hold", 0, {"good": 2}, before={"good": 2}),
    Row(
        "without the margin, the coarse model's error grows",
        *(0, {"start": FAIR}, "raise", 0, {"weight": 2, "error": 0.26, "good": 0}),
        before={"weight": 1, "error": 0.2, "good": 1},
        error=0.26,
        reason="without the margin, and the coarse model's error grows",
    ),
    Row(
        "without the margin, the coarse model's error does not grow much",
        *(0, {"start": FAIR}, "hold", 0, {"error": 0.24, "good": 0}),
        before={"weight": 1, "error": 0.2, "good": 1},
        error=0.24,
    ),
    Row(
        "dearer options are left before the weight is lowered",
        *(1, {"start": GOOD, 0: GOOD}, "descend", 0, {"good": 0, "descended_since": 0}),
        before={"good": 1, "weight": 2},
    ),
]  # fmt: skip
for row in THE_CONSISTENCY_TERM_IS_THE_FIRST_LEVER:
    row.policy = WEIGHING

ROWS = [
    *THE_CONSISTENCY_TERM_IS_THE_FIRST_LEVER,
    *(MEETS_THE_TARGET + A_CHEAPER_RUNG_WAS_TAKEN + MISSES_THE_TARGET),
    *(THE_ERROR_IS_LIMITED_TOO + THE_RESIDUAL_IS_MEASURED + THE_STEP_IS_NOT_FINITE),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_a_check(row):
    state, options = PolicyState(**{"wanted": row.policy.patience} | row.before), LADDER[row.place]
    if row.finite:
        check = row.policy.check(state, STEP, options, row.error)
    else:
        check = row.policy.check_not_finite(state, STEP, options)
    answer, of_those_in_use, of_others = None, [None], []
    for asked, figures in row.answers.items():
        other = isinstance(asked, int)
        request = Request("measure", LADDER[asked]) if other else Request(asked, options)
        assert check.send(answer) == request
        answer = None if figures is None else Measurement(request.options, **figures)
        if answer is not None:
            (of_others if other else of_those_in_use).append(answer)
    with pytest.raises(StopIteration) as end:
        check.send(answer)
    decision, state_after = end.value.value.decision, end.value.value.state
    assert (decision.action, decision.before, decision.after) == (row.action, options, LADDER[row.after])
    assert state_after == dataclasses.replace(state, **row.changed)
    assert row.reason in decision.reason and end.value.value.warning == row.warning
    assert decision.step == STEP and decision.skip is not row.finite
    weights = row.policy.weights
    assert decision.consistency == ((weights[state.weight], weights[state_after.weight]) if weights else None)
    if decision.action != "skip":
        assert decision.measured is of_those_in_use[-1] and decision.tried == tuple(of_others)


def test_the_term_has_had_no_step_to_act_in_at_the_first_check():
    check = WEIGHING.check(PolicyState(wanted=2, weight=1), 1, LADDER[0])
    answers = iter([BAD, BAD, FAIR])
    request = next(check)
    with pytest.raises(StopIteration) as end:
        while True:
            request = check.send(Measurement(request.options, **next(answers)))
    assert end.value.value.decision.after == LADDER[1] and end.value.value.state.weight == 1
