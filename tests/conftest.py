"""Every test runs with one torch thread, like the ranks it starts, and with the same random numbers each time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads; ranks inherit it

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("mlpint", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mlpint")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
