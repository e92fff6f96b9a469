"""A mesh of replicas is one process with all of their data; the checks are in programs/mesh.py."""

import pytest

from scenarios import check, names


@pytest.mark.parametrize("scenario", names("mesh.py"))
@pytest.mark.parametrize(("launcher", "ranks"), [("mpich", 2), ("mpich", 4), ("torchrun", 4)])
def test_mesh(scenario, launcher, ranks):
    check("mesh.py", scenario, launcher, ranks)
