"""The rungs by default, and what is measured against what."""

import pytest

from mlpint import MGRIT
from mlpint.control.ladder import default_ladder, doubled_options, exact_options, finer_options, short_form


def iterations(options):
    return options.forward_iters, options.backward_iters


@pytest.mark.parametrize(
    ("options", "depth", "expected"),
    [
        ((2, 4, 1, 1), 16, [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (0, 3), (0, 0)]),
        ((2, 4, 2, 1), 64, [(2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (0, 3), (0, 0)]),
        ((2, 4, 0, 1), 16, [(0, 1), (0, 2), (0, 3), (0, 0)]),
        ((2, 4, 1, 1), 7, [(1, 1), (0, 1), (0, 0)]),
    ],
)
def test_default_ladders(options, depth, expected):
    assert [iterations(rung) for rung in default_ladder(MGRIT(*options), depth)] == expected


def test_references_have_more_iterations_where_there_are_any():
    options = MGRIT(2, 4, 2, 1, tolerance=0.1)
    assert finer_options(options) == MGRIT(2, 4, 3, 2) and finer_options(MGRIT(2, 4, 0, 1)) == MGRIT(2, 4, 0, 2)
    assert doubled_options(options, 64) == MGRIT(2, 4, 4, 2) and doubled_options(options, 12) == MGRIT(2, 4, 3, 2)
    assert doubled_options(MGRIT(2, 4, 1, 1), 4) == MGRIT(2, 4, 2, 2), "two residuals make one factor"
    assert doubled_options(MGRIT(2, 4, 5, 5, "FCF"), 16) == MGRIT(2, 4, 3, 3, "FCF")
    assert exact_options(options).exact and exact_options(options).cfactor == 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (MGRIT(2, 4, 2, 1), "(2,1) cf 4"),
        (MGRIT(3, 2, 1, 0, "FCF", "sum"), "(1,0) cf 2 sum 3 levels FCF"),
        (MGRIT(1), "exact"),
        (MGRIT(2, 4, 0, 0), "exact"),
    ],
)
def test_short_forms(options, text):
    assert short_form(options) == text
