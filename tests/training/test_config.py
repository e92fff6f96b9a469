"""Configuration: one key, one flag; wrong input is told in one line with exit code 2, before anything is written."""

import dataclasses
import subprocess
import sys

import pytest

from mlpint import cli
from mlpint.cli.flags import flag_values
from mlpint.cli.train import prepare
from mlpint.errors import ConfigError
from mlpint.mgrit.options import MGRIT
from mlpint.training.config import KEYS, SECTIONS, TrainConfig, from_saved, read_toml
from mlpint.training.optimizer import learning_rate


def fails(capsys, tmp_path, *arguments):
    """The line that `mlpint ARGUMENTS` prints on its way out with exit code 2, having written nothing."""
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mlpint: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert sorted(tmp_path.rglob("*")) == before
    return err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "0"], ["layers = 0", "an integer at least 1"]),
        (["--layers", "many"], ["layers = 'many'", "an integer"]),
        (["--layers", "1.5"], ["layers = '1.5'", "an integer"]),
        (["--cfactor", "1"], ["cfactor = 1", "at least 2"]),
        (["--levels", "0"], ["levels = 0", "at least 1"]),
        (["--forward-iters", "-1"], ["forward_iters = -1", "at least 0"]),
        (["--backward-iters", "-1"], ["backward_iters = -1", "at least 0"]),
        (["--relaxation", "CF"], ["relaxation = 'CF'", "F, FCF"]),
        (["--coarse", "rough"], ["coarse = 'rough'", "injection"]),
        (["--tolerance", "1"], ["tolerance = 1", "[0, 1)"]),
        (["--control", "loss"], ["control = 'loss'", "auto, off, gradient, residual"]),
        (["--control", "gradient", "--levels", "1"], ["control = 'gradient'", "the sweeps are exact"]),
        (["--control", "gradient", "--control-target", "1"], ["control_target = 1.0", "below 1"]),
        (["--control-target", "-1"], ["control_target = -1.0", "at least 0"]),
        (["--control-every", "0"], ["control_every = 0", "at least 1"]),
        (["--open-layers", "-1"], ["open_layers = -1", "at least 0"]),
        (
            ["--open-layers", "2", "--close-layers", "2", "--layers", "4"],
            ["open_layers + close_layers = 4", "layers = 4"],
        ),
        (["--dim", "130"], ["dim = 130", "multiple of heads = 4"]),
        (["--dropout", "1"], ["dropout = 1.0", "below 1"]),
        (["--optimizer", "adam"], ["optimizer = 'adam'", "adamw, sgd"]),
        (["--lr", "0"], ["lr = 0.0", "above 0"]),
        (["--lr", "nan"], ["lr = nan", "above 0"]),
        (["--momentum", "1"], ["momentum = 1.0", "below 1"]),
        (["--dtype", "fp8"], ["dtype = 'fp8'", "fp32, bf16"]),
        (["--device", "tpu"], ["device = 'tpu'", "auto, cpu, cuda"]),
        (["--vocabulary", "100"], ["vocabulary = 100", "at least 256"]),
        (["--batch", "4", "--chain-slices", "5"], ["chain_slices = 5: must be at most the 4 sequences"]),
        (["--dropout", "0.1", "--chain-slices", "2"], ["chain_slices = 2 with dropout = 0.1", "control = off"]),
        (["--arch", "llama", "--task", "vit"], ["arch = 'llama'", "task = 'gpt'"]),
        (["--kv-heads", "2"], ["kv_heads = 2", "arch = 'llama'"]),
        (["--arch", "llama", "--kv-heads", "3"], ["kv_heads = 3: must divide heads = 4"]),
        (["--consistency", "-0.5"], ["consistency = -0.5", "at least 0"]),
        (["--consistency", "nan"], ["consistency = nan"]),
        (["--seed", "-1"], ["seed = -1", "at least 0"]),
        (["--steps", "0"], ["steps = 0", "at least 1"]),
        (["--data", "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
        (["--config", "nowhere.toml"], ["nowhere.toml", "cannot be read"]),
        (["--resume", "nowhere"], ["nowhere", "no such run"]),
        (["--layer", "4"], ["unrecognized arguments: --layer 4; did you mean --layers?"]),
        (["--layers"], ["--layers", "expected one argument"]),
    ],
)
def test_wrong_flag(arguments, words, capsys, tmp_path):
    line = fails(capsys, tmp_path, "train", *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nlayer = 4", ["unknown key 'layer' in [model]", "did you mean 'layers'?"]),
        ("[modell]\nlayers = 4", ["unknown section or key 'modell'", "model, solver"]),
        ("layers = 4", ["unknown section or key 'layers'"]),
        ("[model]\nlayers = '4'", ["layers = '4'", "an integer"]),
        ("[model]\nlayers = true", ["layers = True", "an integer"]),
        ("[model]\ntied = 1", ["tied = 1", "true or false"]),
        ("[model\n", ["is not TOML"]),
    ],
)
def test_wrong_file(text, words, capsys, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    line = fails(capsys, tmp_path, "train", "--config", "c.toml")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["plan", "--ranks", "0"], ["plan", "--ranks", "two"], ["plan", "--rows", "0"], ["report"]],
)
def test_wrong_command(arguments, capsys, tmp_path):
    fails(capsys, tmp_path, *arguments)


def test_no_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no GPU" in fails(capsys, tmp_path, "train", "--device", "cuda")


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "mlpint", "train", "--cfactor", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)


def test_flags_go_before_the_file_and_the_file_before_defaults(tmp_path):
    (tmp_path / "c.toml").write_text("[model]\nlayers = 6\ndim = 64\n[optimizer]\nlr = 1\n[solver]\nrecompute = true\n")
    arguments = ["train", "--config", "c.toml", "--dim", "32", "--sequence", "8"]
    options = cli.parser(arguments).parse_args(arguments)
    config, task, checkpoint = prepare(flag_values(options), options.config)
    assert (config.model.layers, config.model.dim, config.model.heads) == (6, 32, 4)
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.solver.recompute and checkpoint is None and task.corpus.vocabulary == 256


def test_every_key_is_a_flag_and_keys_are_unique():
    assert sum(len(dataclasses.fields(section)) for section in SECTIONS.values()) == len(KEYS)
    flags = {action.dest for action in cli.parser(["train"])._subparsers._group_actions[0].choices["train"]._actions}
    assert set(KEYS) <= flags


def test_configuration_survives_saving():
    config = TrainConfig.of({"layers": 6, "lr": 3e-4, "relaxation": "FCF", "tied": False})
    assert TrainConfig.of(from_saved(dataclasses.asdict(config))) == config
    assert TrainConfig.of(config.flat()) == config


def test_keys_that_are_gone_are_passed_over_where_they_had_no_effect():
    saved = dataclasses.asdict(TrainConfig.of({"layers": 6}))
    saved["multilevel"] |= {"coherence": 0.0, "rewarm": 10}
    assert TrainConfig.of(from_saved(saved)) == TrainConfig.of({"layers": 6})
    saved["multilevel"]["coherence"] = 0.5
    with pytest.raises(ConfigError, match="saved configuration: unknown key 'coherence' in .multilevel"):
        from_saved(saved)


def test_solver_keys_reach_the_solver():
    values = {"levels": 3, "cfactor": 2, "forward_iters": 5, "backward_iters": 4, "relaxation": "FCF"}
    values |= {"coarse": "identity", "tolerance": 0.5}
    assert TrainConfig.of(values).solver.mgrit() == MGRIT(**values)


def test_sections_check_themselves():
    with pytest.raises(ConfigError, match="batch = 0"):
        SECTIONS["data"](batch=0)
    with pytest.raises(ConfigError, match="did you mean 'layers'"):
        TrainConfig.of({"layer": 3})


def test_shipped_examples_are_valid(request):
    examples = sorted((request.config.rootpath / "examples").glob("*.toml"))
    assert examples
    for path in examples:
        TrainConfig.of(read_toml(path))


def test_consistency_over_the_steps():
    config = SECTIONS["solver"](consistency=2.0, consistency_start=3, consistency_warmup=4)
    assert [config.consistency_part(step, 9) for step in range(9)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert SECTIONS["solver"](consistency=2.0).consistency_part(0, 9) == 1
    falling = SECTIONS["solver"](consistency=2.0, consistency_warmup=2, consistency_final=0.2)
    assert [falling.consistency_part(step, 5) for step in range(5)] == pytest.approx([0.5, 1, 1, 0.6, 0.2])


def test_the_consistency_term_is_there_by_default_where_injection_iterates_both_ways():
    solver = SECTIONS["solver"]
    assert [
        TrainConfig.of({"task": "vit"} | more).solver.mu for more in ({}, {"coarse": "fitted"}, {"consistency": 1})
    ] == [0.1, 0, 1]
    assert solver().mu == 1 and solver(consistency=0.25).mu == 0.25 and solver(levels=1, consistency=0.5).mu == 0.5
    without = ({"consistency": 0.0}, {"levels": 1}, {"forward_iters": 0}, {"backward_iters": 0}, {"coarse": "fitted"})
    without += ({"step_size": 0.0}, {"step_size": 0.5})
    assert [solver(**options).mu for options in without] == [0] * 7
    for values in ({"multilevel": True}, {"task": "translation"}):
        chosen = TrainConfig.of(values).solver
        assert (chosen.coarse, chosen.forward_iters, chosen.mu) == ("fitted", 2, 0)
    assert TrainConfig.of({"multilevel": True, "coarse": "injection"}).solver.mu == 1


def test_the_controller_of_the_consistency_term_needs_both():
    SECTIONS["solver"](consistency=1.0, coarse="injection", control_consistency=True)
    for wrong in ({"control": "off", "consistency": 1.0}, {"levels": 1}, {"consistency": 0.0}):
        with pytest.raises(ConfigError, match="control_consistency needs error control, and a consistency above 0"):
            SECTIONS["solver"](coarse="injection", control_consistency=True, **wrong)


def test_learning_rate():
    config = SECTIONS["optimizer"](lr=2.0, warmup=4, final_lr=0.1)
    rates = [learning_rate(step, 25, config) for step in range(25)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx(0.2 + 1.8 / 2)
    assert rates[24] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    config = SECTIONS["optimizer"](lr=2.0, warmup=4, final_lr=0.1, schedule="wsd", decay=0.4)
    rates = [learning_rate(step, 25, config) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and set(rates[4:15]) == {2.0}
    assert rates[15:] == pytest.approx([0.2 + 0.18 * left for left in range(9, -1, -1)])
