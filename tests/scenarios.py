"""Starting a program of scenarios (tests/programs/runner.py) once per launcher and number of ranks, as many tests."""

import functools
import json
from pathlib import Path

from launch import run

PROGRAMS = Path(__file__).parent / "programs"

# MPICH with 1 to 4 ranks; the other MPI and gloo, whose transports have tests of their own, with both ends.
JOBS = [("alone", 1), ("mpich", 2), ("mpich", 3), ("mpich", 4), ("openmpi", 2), ("torchrun", 2)]


@functools.cache
def outcome(program: str, launcher: str, ranks: int) -> tuple[dict[str, str], str]:
    """Error text of each scenario that was run (empty where it passed), and what the job printed."""
    result = run(PROGRAMS / program, ranks, launcher, timeout=240, env={"MLPINT_STALL_LIMIT": "30"})
    errors = {}
    for line in result.stdout.splitlines():
        if line.startswith('{"scenario"'):
            record = json.loads(line)
            errors[record["scenario"]] = record["error"]
    return errors, f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"


def check(program: str, scenario: str, launcher: str, ranks: int) -> None:
    errors, printed = outcome(program, launcher, ranks)
    assert scenario in errors, f"the job ended before {scenario}: {printed}"
    assert not errors[scenario], printed


def names(program: str) -> list[str]:
    """The scenarios of a program, read from its text: importing it would start nothing but needs its own path."""
    import ast

    tree = ast.parse((PROGRAMS / program).read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args] == ["comm"]
    ]
