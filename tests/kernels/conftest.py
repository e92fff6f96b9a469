"""Kernels run in Triton's interpreter where there is no GPU, and as they are where there is one.

Triton's own device functions follow TRITON_INTERPRET at Triton's first import, so it is imported here with the variable
set. Kernels follow Triton's knob when they are defined; it stays set in this process. The variable does not, so that
processes other tests start see nothing of it.
"""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError("Triton was imported before tests/kernels could set TRITON_INTERPRET: run them first")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    del os.environ["TRITON_INTERPRET"]
    triton.knobs.runtime.interpret = True


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def poisoned():
    """New memory is NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
