"""A run's directory: one job at a time, and found to be writable before training; a full disk loses no checkpoint."""

import resource
import signal
import subprocess
import sys

import pytest
from torch import nn

from mlpint import checkpoint, cli
from mlpint.errors import UserError

TINY = [
    "train",
    "--layers=3",
    "--open-layers=1",
    "--close-layers=1",
    "--dim=8",
    "--heads=2",
    "--sequence=8",
    "--batch=1",
]
TINY += ["--steps=2", "--eval-batches=1", "--sample=0", "--compare=0", "--control=off", "--checkpoint-every=1"]
HOLDER = """
import sys, time
from mlpint.training.run_directory import _claimed
from pathlib import Path
with _claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_second_job_is_refused_until_the_first_is_gone(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main([*TINY, f"--out={run}"]) == 0
    before = contents(run)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        capsys.readouterr()
        assert cli.main(["train", f"--resume={run}", "--steps=3"]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and f"{run}: another job is writing to it" in err and "step" not in out
        assert contents(run) == before
        first.send_signal(signal.SIGKILL)  # a job that dies keeps no lock
    assert cli.main(["train", f"--resume={run}", "--steps=3"]) == 0


@pytest.mark.parametrize("case", ["full", "no directory", "not writable"])
def test_where_nothing_can_be_written_is_told_before_training(case, tmp_path, capsys):
    out = tmp_path / "run"
    if case == "full":
        out.mkdir()
        (out / ".lock").symlink_to("/dev/full")
    elif case == "no directory":
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "run"
    else:
        out = "/proc/self/fdinfo"
    assert cli.main([*TINY, f"--out={out}"]) == 2
    shown, err = capsys.readouterr()
    assert err.count("\n") == 1 and str(out) in err and shown == ""
    assert case != "full" or "cannot be written (No space left on device)" in err


def test_a_save_that_fails_names_the_file_and_keeps_the_checkpoint_before(tmp_path):
    model = nn.Linear(100, 100)
    checkpoint.save(tmp_path, 1, model)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as where a quota is used up
    try:
        with pytest.raises(UserError, match=r"rank-00000\.safetensors: .*File too large"):
            checkpoint.save(tmp_path, 2, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before
    assert checkpoint.open_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("key", ["layers=4", "dim=16", "heads=4", "ffn=8", "sequence=16", "vocabulary=300"])
def test_going_on_with_other_sizes_names_the_key(key, tmp_path, capsys, finished):
    name, _, value = key.partition("=")
    before = contents(finished)
    assert cli.main(["train", f"--resume={finished}", "--steps=3", f"--{key}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mlpint: error: {name} = {value}: must be ") and err.count("\n") == 1
    assert contents(finished) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main([*TINY, f"--out={run}"]) == 0
    return run
