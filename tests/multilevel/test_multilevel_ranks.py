"""Multilevel training on real ranks: programs/multilevel.py."""

import json
from pathlib import Path

from launch import run

PROGRAM = Path(__file__).parents[1] / "programs" / "multilevel.py"


def test_on_ranks():
    """Three: they own different numbers of layers, and some none of a coarse network's."""
    result = run(PROGRAM, 3, "mpich", timeout=120).check()
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(reports) == 4 and not any(report["error"] for report in reports)
