"""The solver computes what MGRIT is, with the work it promises; the checks are in programs/solver.py."""

import pytest

from scenarios import check, names

# What Open MPI and gloo do with messages is tested in tests/comm.
JOBS = [("alone", 1), ("mpich", 2), ("mpich", 3), ("mpich", 4)]


@pytest.mark.parametrize("scenario", names("solver.py"))
@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_solver(scenario, launcher, ranks):
    check("solver.py", scenario, launcher, ranks)
