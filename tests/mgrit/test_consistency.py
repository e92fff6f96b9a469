"""The consistency term on real ranks; the scenarios are in tests/programs/consistency.py."""

import pytest

from scenarios import check, names


@pytest.mark.parametrize("scenario", names("consistency.py"))
@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), ("mpich", 2), ("mpich", 4)])
def test_consistency(scenario, launcher, ranks):
    check("consistency.py", scenario, launcher, ranks)
