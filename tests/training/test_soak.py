"""A job that is struck by one fault after another, and resumed each time, ends where an undisturbed one does."""

import itertools
import os
import random
import time

import pytest

from launch import run
from mlpint.checkpoint import open_checkpoint

# Half a minute of training between two faults, ten minutes in all; MLPINT_SOAK_SECONDS=60 is a short look (12 s).
SECONDS = float(os.environ.get("MLPINT_SOAK_SECONDS", "600"))
BETWEEN = 30 if SECONDS > 120 else 12
FAULTS = ("SIGKILL", "exit", "SIGSTOP", "raise", "SIGSEGV", "SIGTERM")

PROGRAM = """
import os, signal, sys, threading
from mlpint import cli
from mlpint.training import command
from mlpint.training.trainer import Trainer

kind, rank, seconds = os.environ["SOAK"].split()
due = threading.Event()

def strike():
    if kind == "exit":
        os._exit(0)
    due.set()
    if kind != "raise":
        os.kill(os.getpid(), getattr(signal, kind))

timer = threading.Timer(float(seconds), strike)  # from the first step on: a start takes its time
timer.daemon = True

class Struck(Trainer):
    def training_loss(self, *args):
        if os.environ["PMI_RANK"] == rank and not timer.ident:
            timer.start()
        if due.is_set():
            raise ValueError("struck")
        return super().training_loss(*args)

command.Trainer = Struck
sys.exit(cli.main(sys.argv[1:]))
"""


def train(out, resume=False, fault="none 9 0"):
    sizes = "--layers=12 --dim=32 --heads=2 --sequence=32 --batch=8 --open-layers=1 --close-layers=1 --cfactor=2"
    run_of = (
        f"--steps={int(SECONDS * 12)} --checkpoint-every=10 --checkpoint-keep=2 --compare=0 --sample=0 --log-every=50"
    )
    arguments = ("train", f"--resume={out}") if resume else ("train", *sizes.split(), *run_of.split(), f"--out={out}")
    env = {"SOAK": fault, "MLPINT_STALL_LIMIT": "5"}
    return run(PROGRAM, 4, "mpich", args=arguments, env=env, timeout=SECONDS * 3 + 120)


@pytest.mark.slow
@pytest.mark.timeout(int(SECONDS * 8 + 600))
def test_faults_and_resuming_change_nothing(tmp_path):
    started, chance, ends = time.monotonic(), random.Random(0), []
    for kind in itertools.cycle(FAULTS):
        resume = (tmp_path / "struck" / "checkpoints" / "latest").exists()
        calm = time.monotonic() - started > SECONDS and len(ends) >= min(len(FAULTS), SECONDS // BETWEEN)
        fault = "none 9 0" if calm else f"{kind} {chance.randrange(4)} {BETWEEN * chance.uniform(0.7, 1)}"
        result = train(tmp_path / "struck", resume, fault)
        assert not result.orphans and result.returncode != 2, (fault, result.describe(), result.stderr)
        if result.returncode == 0:
            break
        ends.append((fault, result.returncode, round(result.seconds)))
    assert len(ends) >= 2, ends  # how many more is the machine's speed
    train(tmp_path / "calm").check()
    calm, struck = (open_checkpoint(tmp_path / name / "checkpoints") for name in ("calm", "struck"))
    assert calm.step == struck.step == int(SECONDS * 12)
    one, other = (c.read(c.tensors) for c in (calm, struck))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one), ends
    print(f"{len(ends)} faults: {ends}")
