"""The solver computes what MGRIT is, with the work it promises; the checks are in programs/solver.py."""

import pytest

from scenarios import JOBS, check, names


@pytest.mark.parametrize("scenario", names("solver.py"))
@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_solver(scenario, launcher, ranks):
    check("solver.py", scenario, launcher, ranks)
