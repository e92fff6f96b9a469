"""What users' other libraries do with a layer-parallel model: clip, save, resume, add adapters."""

import pytest

from scenarios import check, names


@pytest.mark.parametrize("scenario", names("flows.py"))
@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), ("mpich", 3)])
def test_flows(scenario, launcher, ranks):
    check("flows.py", scenario, launcher, ranks)
