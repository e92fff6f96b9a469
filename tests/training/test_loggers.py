"""What a run hands on beside metrics.jsonl: to a function, to TensorBoard, to wandb, each with the same numbers."""

import sys

import pytest
from tensorboard.backend.event_processing import event_accumulator

from mlpint import cli
from mlpint.comm.communicator import Comm
from mlpint.training import loggers, tasks
from mlpint.training.command import train
from mlpint.training.config import TrainConfig
from mlpint.training.metrics import read_lines

SMALL = {"layers": 4, "dim": 8, "heads": 2, "sequence": 8, "batch": 2, "open_layers": 0, "close_layers": 0}
SMALL |= {"steps": 3, "cfactor": 2, "sample": 0, "compare": 0, "eval_every": 2, "eval_batches": 1, "control_start": 0}


def flags(**values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | values).items()]


def test_a_function_gets_each_line(tmp_path):
    config, lines = TrainConfig.of(SMALL | {"out": str(tmp_path)}), []
    train(config, tasks.make(config), Comm.of(None), hook=lines.append)
    assert lines == read_lines(tmp_path / "metrics.jsonl") and "config" in lines[0] and lines[-1]["step"] == 3


def test_tensorboard(tmp_path):
    assert cli.main(["train", *flags(log="tensorboard", out=tmp_path)]) == 0
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    for name in ("loss", "grad_norm"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines
        ]
    assert [e.step for e in events.Scalars("val_loss")] == [2, 3]  # null in the other lines
    cosine = lines[0]["control"]["measured"]["cosine"]
    assert events.Scalars("control/measured/cosine")[0].value == pytest.approx(cosine)


class Recorded:
    """In the place of the package wandb, whose own run needs its service: what is called, and with what."""

    def __init__(self):
        self.calls = []

    def init(self, **keywords):
        self.calls.append(("init", keywords))
        return self

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


def test_wandb(tmp_path, monkeypatch):
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", recorded)
    assert cli.main(["train", *flags(log="wandb", out=tmp_path)]) == 0
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert recorded.calls[0] == ("init", {"dir": str(tmp_path), "name": tmp_path.name, "config": lines[0]})
    assert recorded.calls[1:-1] == [("log", line["step"], dict(loggers.scalars(line))) for line in lines[1:]]
    assert recorded.calls[-1] == ("finish",)


def test_a_package_that_is_missing_is_named_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["train", *flags(log="wandb", out=tmp_path)]) == 2
    assert "log = 'wandb': needs the package wandb: pip install wandb" in capsys.readouterr().err


def test_a_run_without_matplotlib_says_so_and_a_report_is_refused(tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.backends.backend_agg", "matplotlib.figure", "matplotlib.patches"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["train", *flags(out=tmp_path)]) == 0
    hint = "pictures need the package matplotlib, which is not installed: pip install matplotlib"
    assert f"no pictures and no report.html: {hint}" in capsys.readouterr().out
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 4 and not (tmp_path / "loss.png").exists()
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    assert hint in capsys.readouterr().err


def test_numbers_of_a_line():
    line = {"step": 3, "loss": 2, "val_loss": None, "mode": "exact", "flag": True, "control": {"measured": {"c": 0.5}}}
    assert dict(loggers.scalars(line)) == {"loss": 2.0, "control/measured/c": 0.5}
