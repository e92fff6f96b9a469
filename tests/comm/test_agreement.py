"""Ranks that disagree are named, with what they disagree on, before any data moves; the job ends."""

import pytest

from launch import run
from scenarios import PROGRAMS


@pytest.mark.parametrize(
    ("what", "text", "constructed"),
    [
        ("depth", "5 with", False),
        ("layer shapes", "6 with", False),
        ("options", "cfactor=3", False),
        ("replaced options", "forward_iters=5", True),
        ("mode", "training: 'True' on rank 1, 'False' on rank 2", True),
        ("batch size", "3x4 float32 cpu' on rank 1, '2x4 float32 cpu' on rank 2", True),
        ("dtype", "'3x4 float32 cpu' on rank 1, '3x4 float64 cpu' on rank 2", True),
        ("gradients", "records: 'True' on rank 1, 'False' on rank 2", True),
        ("skipped pass", "operation: 'forward' on rank 1, 'state_dict' on rank 2", True),
        ("skipped backward", "operation: 'backward' on rank 1, 'forward' on rank 2", True),
    ],
)
def test_ranks_that_disagree(what, text, constructed):
    launcher = "torchrun" if what in ("batch size", "options") else "mpich"
    result = run(PROGRAMS / "disagree.py", 3, launcher, args=(what,), env={"MLPINT_STALL_LIMIT": "20"})
    assert result.returncode != 0 and result.seconds < 30 and not result.orphans, result.describe()
    assert text in result.stderr, result.stderr
    assert ("constructed" in result.stdout) == constructed
    assert "through" not in result.stdout
