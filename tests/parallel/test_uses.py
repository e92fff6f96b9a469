"""Uses of a stack that are right, refused or warned of: the checks are in programs/uses.py, a list in docs/uses.md."""

import pytest

from scenarios import check, names


@pytest.mark.parametrize("scenario", names("uses.py"))
@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), ("mpich", 3)])
def test_uses(scenario, launcher, ranks):
    check("uses.py", scenario, launcher, ranks)
