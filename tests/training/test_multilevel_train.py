"""``mlpint train --multilevel``: schedule, metrics, checkpoints, curves over FLOPs."""

import json
import math
from pathlib import Path

import pytest
import torch

from mlpint import checkpoint, cli
from mlpint.multilevel.stopping import StoppingRule
from mlpint.training.config import TrainConfig, read_toml
from mlpint.training.trainer import Trainer

EXAMPLE = Path(__file__).parents[2] / "examples" / "multilevel.toml"
SMALL = {"layers": 4, "dim": 8, "heads": 2, "sequence": 8, "batch": 2, "eval_batches": 1, "sample": 0, "compare": 0}
SMALL |= {"open_layers": 0, "close_layers": 0, "cfactor": 2, "forward_iters": 1, "optimizer": "adamw", "lr": 0.01}
SMALL |= {"dropout": 0.1, "coarse_steps": 2, "cycles": 2, "steps": 3, "warmup": 0, "device": "cpu", "clip": 0.5}
SMALL |= {"control": "off"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(*flags, **values):
    named = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | values).items()]
    return cli.main(["train", "--multilevel", *named, *flags])


def steps_of(run):
    return [line for line in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def weights(run):
    found = checkpoint.open_checkpoint(run)
    return found.read(name for name in found.tensors if name.startswith("model."))


def test_a_run_and_going_on_with_it_in_the_middle_of_a_cycle(capsys):
    options = {"optimizer_state": "restrict", "coarse": "fitted", "control": "gradient", "control_start": 0}
    assert train("--out=whole", checkpoint_every=4, **options) == 0
    lines = steps_of("whole")
    assert [line["network"] for line in lines] == ["fine", *"AABB", "fine", *"AABB", "fine"]
    assert [line["fine_step"] for line in lines] == [1] * 5 + [2] * 5 + [3]
    assert [lines[n]["lr"] for n in (0, 4, -1)] == pytest.approx([0.01, 0.01, 0.001])
    fine = lines[5]["flops"] - lines[4]["flops"]
    checked = lines[0]["flops"] / fine - 1  # passes of the first step's check
    assert checked == 2
    assert [line["flops"] / fine - checked for line in lines] == [1, 1.5, 2, 2.5, 3, 4, 4.5, 5, 5.5, 6, 7]
    assert all(line["flops_all"] > line["flops"] for line in lines)
    assert "step 11/11  fine" in capsys.readouterr().out

    cut = Path("whole", "checkpoints", "step-00000008")  # fine A A B B fine A A | B B fine
    assert cli.main(["train", f"--resume={cut}", "--out=again"]) == 0
    for line, other in zip(steps_of("again"), lines[8:], strict=True):
        assert {**line, "seconds": 0} == {**other, "seconds": 0}
    expected = weights("whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights("again").items())
    capsys.readouterr()
    for flags, words in (
        (["--no-multilevel"], "multilevel = False: must be True, as in"),
        (["--delta=0.5"], "delta = 0.5: must be 0.25, as it was when the state was saved"),
        (["--steps=2"], "steps = 2: must be above 2"),
    ):
        assert cli.main(["train", f"--resume={cut}", "--out=other", *flags]) == 2
        assert words in capsys.readouterr().err


def test_error_control_that_begins_at_a_resumption_counts_fine_steps():
    assert train("--out=whole", checkpoint_every=4) == 0
    cut = Path("whole", "checkpoints", "step-00000008")  # fine A A B B fine A A | B B fine
    assert cli.main(["train", f"--resume={cut}", "--out=again", "--control=gradient", "--control-every=2"]) == 0
    checks = [line["control"]["step"] for line in steps_of("again") if "control" in line]
    assert checks == [3]  # as in a run that is checked from its start, on steps 1 and 3


def test_curves_over_what_they_cost(capsys):
    assert train("--out=a") == 0 and train("--no-multilevel", "--out=b") == 0
    assert [line["flops"] for line in steps_of("b")] == [n * steps_of("a")[0]["flops"] for n in (1, 2, 3)]
    for over in ("steps", "flops", "flops-all", "tokens", "seconds"):
        assert cli.main(["report", "a", "b", "--over", over, "--out", f"{over}.png"]) == 0
        assert Path(f"{over}.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert cli.main(["report", "a", "--over", "money"]) == 2
    assert "over = 'money': must be one of steps, flops, flops-all, tokens, seconds" in capsys.readouterr().err
    old = [{k: v for k, v in line.items() if "flops" not in k} for line in steps_of("b")]
    Path("old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert cli.main(["report", "old.jsonl", "--over", "flops"]) == 2
    assert "old.jsonl: step 1 has no 'flops'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layers=5"], "5 layers cannot be split evenly into 2 coarse networks"),
        (["--layers=6", "--depths=3"], "their number must be a multiple of 4; take 4 or 8 layers"),
        (["--delta=2"], "delta = 2.0: must be a number at least 0 and at most 1"),
        (["--coarse-steps=0"], "coarse_steps = 0: must be an integer at least 1"),
        (["--cycles=-1", "--clock=work"], "clock = 'work': its length is not known with cycles = -1"),
        (["--preset=stack"], "preset = 'stack': must be one of paper, cascade, grow"),
        (["--optimizer-state=none"], "optimizer_state = 'none': must be one of restrict, carry"),
        (["--optimizer-state=separate"], "optimizer_state = 'separate': must be one of restrict, carry"),
        (["--neighbours=correction"], "neighbours = 'correction': must be one of none, average"),
        (["--clock=own"], "clock = 'own': must be one of shared, work"),
        (["--coherence=1"], "unrecognized arguments: --coherence=1"),
        (["--rewarm=1"], "unrecognized arguments: --rewarm=1"),
        (["--layout=cyclic", "--coarse=sum"], "coarse networks run in layout='block' only"),
    ],
)
def test_wrong_input_is_told_in_one_line(flags, words, capsys):
    assert train(*flags) == 2
    assert words in capsys.readouterr().err and not Path("runs").exists()


def test_the_example_names_the_papers_network():
    config = TrainConfig.of(read_toml(EXAMPLE))
    assert config.multilevel.multilevel and config.model.layers == 12 and config.optimizer.optimizer == "sgd"
    named = {
        line.split("=")[0].strip(): line.split("# ")[1].split()[0]
        for line in EXAMPLE.read_text().splitlines()
        if "=" in line and "# " in line and not line.startswith("#")
    }
    assert (named["dim"], named["coarse_steps"], config.model.heads) == ("256", "100", 8)
    assert "cycles = 35" in next(line for line in EXAMPLE.read_text().splitlines() if line.startswith("preset = "))


def test_the_preset_stands_for_the_keys_that_are_not_given():
    cascade = {"delta": 1.0, "neighbours": "average", "single": True, "cycles": 1}
    options = TrainConfig.of({"preset": "cascade"}).multilevel.options()
    assert options == TrainConfig.of(cascade).multilevel.options()
    assert TrainConfig.of({"preset": "cascade", "delta": 0.5}).multilevel.options() == options | {"delta": 0.5}
    assert TrainConfig.of(read_toml(EXAMPLE)).multilevel.options().items() >= cascade.items()
    assert TrainConfig.of({"preset": "paper"}) == TrainConfig()
    grow = TrainConfig.of({"preset": "grow", "layers": 12, "open_layers": 1})
    keys = {"coarse_networks": 9, "coarse_step_size": "unit", "clock": "work", "schedule": "wsd"}
    assert grow == TrainConfig.of(cascade | keys | {"preset": "grow", "layers": 12, "open_layers": 1})
    assert TrainConfig.of({"preset": "grow", "coarse_networks": 4}).multilevel.coarse_networks == 4


def test_a_cascade(capsys):
    assert train("--preset=cascade", "--cycles=1", "--out=a", checkpoint_every=3) == 0
    assert [line["network"] for line in steps_of("a")] == ["fine", "A", "A", "fine", "fine"]
    assert cli.main(["train", "--resume=a/checkpoints/step-00000003", "--preset=paper", "--out=b"]) == 2
    assert "preset = 'paper': must be 'cascade', as in" in capsys.readouterr().err


@pytest.mark.parametrize("buffers", [0, 1])
def test_growing_from_one_layer(buffers):
    assert train("--preset=grow", "--cycles=1", "--out=a", open_layers=buffers, close_layers=buffers) == 0
    assert [line["network"] for line in steps_of("a")] == ["fine", "A", "A", "fine", "fine"]


def test_cycles_by_measured_benefit():
    assert train("--out=a", cycles=-1, steps=12, coarse_steps=1) == 0
    names = [line["network"] for line in steps_of("a")]
    assert names.count("fine") == 12 and names.count("A") == names.count("B") >= 5


def test_cycles_by_measured_benefit_go_by_no_step_that_was_skipped(monkeypatch):
    seen, another, forward_backward = [], StoppingRule.another, Trainer.forward_backward

    def watched(rule, flops, loss):
        seen.append(loss)
        return another(rule, flops, loss)

    def overflowing(trainer, step, microbatch, position):
        loss = forward_backward(trainer, step, microbatch, position)
        if trainer.phase is not None and trainer.phase.fine and trainer.phase.fine_step == 2:  # its loss is finite
            for p in trainer.model.parameters():
                p.grad = torch.full_like(p, math.inf)
        return loss

    monkeypatch.setattr(StoppingRule, "another", watched)
    monkeypatch.setattr(Trainer, "forward_backward", overflowing)
    assert train("--out=a", "--control=gradient", cycles=-1, steps=5, coarse_steps=1) == 0
    fine = [line for line in steps_of("a") if line["network"] == "fine"]
    assert seen == [line["loss"] for line in fine]
    assert [(line["step"], line["fine_step"]) for line in fine] == [(1, 1), (4, 2), (8, 4), (11, 5)]  # step 7: no loss
