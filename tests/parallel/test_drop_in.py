"""LayerParallel does what the unwrapped modules do; the checks are in programs/drop_in.py."""

import pytest

from scenarios import JOBS, check, names


@pytest.mark.parametrize("scenario", names("drop_in.py"))
@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_drop_in(scenario, launcher, ranks):
    check("drop_in.py", scenario, launcher, ranks)
