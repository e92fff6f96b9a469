"""`mlpint train`, alone and on several ranks, held to a training loop in plain PyTorch."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch.nn import functional as F

import mlpint
from launch import run
from mlpint import checkpoint, cli
from mlpint.nn.stack import named_rows
from mlpint.training import plots, tasks
from mlpint.training.comparison import compare
from mlpint.training.config import TrainConfig
from mlpint.training.data import Batches, load
from mlpint.training.metrics import Metrics, read_lines
from mlpint.training.models import GPT, Shape
from mlpint.training.sampling import generate
from mlpint.training.trainer import Trainer

SMALL = {
    "layers": 10,
    "dim": 16,
    "heads": 2,
    "sequence": 16,
    "batch": 4,
    "open_layers": 1,
    "close_layers": 1,
    "lr": 1e-2,
}
SMALL |= {"warmup": 3, "eval_batches": 2, "sample": 0, "compare": 0}
SMALL |= {"forward_iters": 2, "coarse": "fitted", "beta2": 0.999}  # which learns; without the consistency term
COMMAND = "import sys; from mlpint.cli import main; sys.exit(main())"


def flags(**values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | values).items()]


def steps_of(directory):
    return [line for line in read_lines(directory / "metrics.jsonl") if "loss" in line]


def losses_of(directory):
    return [line["loss"] for line in steps_of(directory)]


def plain_losses(steps, accumulate=1, optimizer="adamw", clip=1.0, arch="gpt2", kv_heads=0):
    """The same training in plain PyTorch: no LayerParallel, no code of the training loop."""
    torch.manual_seed(0)
    corpus = load("", sequence=16)
    model = GPT(256, 16, Shape(layers=10, dim=16, heads=2, llama=arch == "llama", kv_heads=kv_heads))
    decays = [p for p in model.parameters() if p.dim() == 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() == 1]}]
    if optimizer == "adamw":
        opt = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    else:
        opt = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)

    def rate(step):
        return (step + 1) / 3 if step < 3 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / (steps - 4)))

    schedule = torch.optim.lr_scheduler.LambdaLR(opt, rate)
    batches, losses = Batches(corpus, 16, 4, seed=0), []
    for step in range(steps):
        parts = []
        for m in range(accumulate):
            inputs, targets = batches.train(step * accumulate + m)
            loss = F.cross_entropy(model(inputs).reshape(-1, 256), targets.reshape(-1))
            (loss / accumulate).backward()
            parts.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
        schedule.step()
        losses.append(sum(parts) / accumulate)
    with torch.no_grad():
        held_out = [batches.validation(i, 2) for i in range(2)]
        val = [F.cross_entropy(model(x).reshape(-1, 256), y.reshape(-1)).item() for x, y in held_out]
    return losses, sum(val) / 2


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2, "clip": 0.5}, {"optimizer": "sgd"}, {"arch": "llama", "kv_heads": 1}],
    ids=["adamw", "accumulate", "sgd", "llama"],
)
def test_exact_training_is_plain_training(options, tmp_path):
    expected, val_loss = plain_losses(8, **options)
    assert cli.main(["train", *flags(steps=8, levels=1, out=tmp_path / "run", **options)]) == 0
    lines = steps_of(tmp_path / "run")
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)
    assert lines[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-5)
    assert lines[-1]["mode"] == "exact" and lines[-1]["iterations"] == {"forward": 0, "backward": 0}


def test_two_ranks_train_a_llama_as_one_does(tmp_path):
    options = {"arch": "llama", "steps": 4, "forward_iters": 1, "coarse": "injection", "cfactor": 2, "sample": 5}
    launched("mpich", 2, *flags(out=tmp_path / "two", **options)).check()
    assert cli.main(["train", *flags(out=tmp_path / "one", **options)]) == 0
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    lines = steps_of(tmp_path / "two")
    # Queries, keys, values, projection and three matrices of 16 x 48, 10 layers; attention of 16 places.
    assert lines[0]["flops"] >= 3 * 10 * 64 * (2 * (4 * 256 + 3 * 16 * 48) + 4 * 16 * 16) > 0.3 * lines[0]["flops"]


def test_what_a_run_leaves_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = flags(steps=60, eval_every=20, checkpoint_every=30, sample=10, compare=1, cfactor=2)
    assert cli.main(["train", *arguments]) == 0
    out, err = capsys.readouterr()
    run_directory = tmp_path / "runs" / "001"
    lines = read_lines(run_directory / "metrics.jsonl")
    assert lines[0]["config"]["model"]["layers"] == 10 and lines[0]["ranks"] == 1
    assert lines[0]["machine"]["torch"] == torch.__version__
    steps = steps_of(run_directory)
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert [line["step"] for line in steps if line["val_loss"] is not None] == [20, 40, 60]
    names = "step loss val_loss lr grad_norm seconds tokens mode iterations flops flops_all"
    assert set(steps[1]) == set(names.split()) and set(steps[20]) == {*names.split(), "control"}
    assert steps[-1]["tokens"] == 60 * 4 * 16 and steps[-1]["iterations"] == {"forward": 2, "backward": 1}
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.5 and steps[-1]["val_loss"] < steps[0]["loss"] - 1.5

    assert (run_directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_directory / "sample.txt").stat().st_size >= 16 + 10
    assert checkpoint.open_checkpoint(run_directory).step == 60
    assert "step 60/60  loss" in out and "that (2,1) cf 2 fitted can reach" in out and "control    3 checks" in out
    compared = lines[-1]["comparison"]  # one cosine, in the log, in the file and on the page
    cosine = f"{compared['gradient_cosine']:.4f}"
    assert f"gradient   cosine {cosine}, relative error {compared['gradient_error']:.3f} against the exact" in out
    page = (run_directory / "report.html").read_text()
    assert cosine in page and 'src="data:image/png;base64' in page and "http" not in page
    assert err == ""  # no progress bar where there is no terminal

    assert cli.main(["train", *flags(steps=1)]) == 0  # a second run never writes over the first
    assert (tmp_path / "runs" / "002" / "metrics.jsonl").exists()
    assert checkpoint.open_checkpoint(tmp_path / "runs" / "002").step == 1  # the last step's, without being asked for
    assert cli.main(["report", "runs/001", "runs/002", "--out", "both.png"]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["report", "runs/001", "runs/002"]) == 0
    assert "<th>runs/001</th><th>runs/002</th>" in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    assert cli.main(["train", *flags(steps=1, out="runs/001")]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert len(losses_of(run_directory)) == 60


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_resuming_is_as_if_never_stopped(optimizer, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"steps": 6, "checkpoint_every": 2, "dropout": 0.1, "accumulate": 2, "optimizer": optimizer}
    options |= {"coarse": "fitted", "cfactor": 2}  # which learns as it goes
    assert cli.main(["train", *flags(out=whole, **options)]) == 0
    assert cli.main(["train", *flags(out=cut, checkpoint_keep=2, **options)]) == 0
    assert len([*(cut / "checkpoints").glob("step-*")]) == 2
    (cut / "checkpoints" / "latest").write_text("step-00000004\n")  # as if it had been killed in step 5 or 6
    assert cli.main(["train", "--resume", str(cut)]) == 0
    assert losses_of(cut) == losses_of(whole)
    assert weights(cut) == weights(whole)
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(cut)]) == 2
    assert "steps = 6: must be above 6" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(cut), "--dim", "32", "--steps", "8"]) == 2
    assert "dim = 32: must be 16" in capsys.readouterr().err


def weights(run_directory):
    """Every tensor of the latest checkpoint, model and optimiser, as bytes."""
    found = checkpoint.open_checkpoint(run_directory)
    return {name: tensor.numpy().tobytes() for name, tensor in found.read(found.tensors).items()}


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, capsys):
    arguments = flags(steps=50, optimizer="sgd", lr=1e9, warmup=0, clip=0, control="off", out=tmp_path / "run")
    assert cli.main(["train", *arguments]) == 1
    err = capsys.readouterr().err
    assert "lower lr" in err and err.count("\n") == 1


CONTROL = {"control": "gradient", "control_target": 0.99, "control_every": 2, "forward_iters": 1, "cfactor": 2}
CONTROL |= {"coarse": "injection", "dropout": 0.1, "accumulate": 2, "checkpoint_every": 4}


def checks_of(directory):
    return [line["control"] for line in steps_of(directory) if "control" in line]


def test_error_control(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main(["train", *flags(steps=12, out=whole, **CONTROL)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "control    6 checks in " in out
    checks = checks_of(whole)
    assert [c["step"] for c in checks] == [1, 3, 5, 7, 9, 11]
    assert all(f"\nstep {c['step']}, (" in out and c["reason"] in out for c in checks)
    changed = next(c for c in checks if c["action"] == "climb")
    assert changed["measured"]["cosine"] < 0.99 <= changed["tried"][-1]["cosine"]
    points = plots.checks(plots.with_place("", read_lines(whole / "metrics.jsonl"), "steps"))
    for point, check in zip(points, checks, strict=True):  # one figure in the picture, in the log and in metrics.jsonl
        line = next(line for line in out.splitlines() if line.startswith(f"step {check['step']}, ("))
        against = check["measured"]["reference"]
        assert (point.place, point.value) == (check["step"], check["measured"]["cosine"])
        shown = f"gradient cosine {point.value:.4f}, error {check['measured']['error']:.3g} against "
        assert check["action"] == "descend" or shown + ("the exact sweep" if against == "exact" else against) in line
        assert point.estimated == (against != "exact")
    assert changed["measured"]["reference"] == "exact" and any(point.estimated for point in points)
    assert f"-> ({changed['after']['forward_iters']},{changed['after']['backward_iters']}) cf 2: " in out
    modes = [line["mode"] for line in steps_of(whole)]
    assert modes[0] == "(1,1) cf 2" and modes[changed["step"]] != modes[changed["step"] - 1]

    assert cli.main(["train", *flags(steps=12, out=cut, **CONTROL)]) == 0
    (cut / "checkpoints" / "latest").write_text("step-00000008\n")
    assert cli.main(["train", "--resume", str(cut)]) == 0
    assert losses_of(cut) == losses_of(whole) and weights(cut) == weights(whole)
    assert [{**c, "seconds": 0} for c in checks_of(cut)] == [{**c, "seconds": 0} for c in checks]
    capsys.readouterr()
    other = tmp_path / "other"
    again = ["train", "--resume", str(cut), "--steps=14", f"--out={other}", "--cfactor=4", "--control-target=0.01"]
    assert cli.main(again) == 0  # options that were asked for anew: control begins with these
    assert {line["mode"] for line in steps_of(other)} == {"(1,1) cf 4"} and checks_of(other)[0]["step"] == 13


def test_error_control_does_not_change_what_it_does_not_decide(tmp_path):
    held = CONTROL | {"control_target": 1e-6}
    assert cli.main(["train", *flags(steps=6, out=tmp_path / "with", **held)]) == 0
    assert cli.main(["train", *flags(steps=6, out=tmp_path / "without", **held | {"control": "off"})]) == 0
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_error_control_by_the_residual(tmp_path):
    options = CONTROL | {"control": "residual", "control_target": 1e-3}
    assert cli.main(["train", *flags(steps=4, out=tmp_path / "run", **options)]) == 0
    first = checks_of(tmp_path / "run")[0]
    assert first["action"] == "climb" and max(first["measured"]["convergence_factor"].values()) > 1e-3


def test_steps_that_are_no_numbers_are_skipped_and_then_end_the_run(tmp_path, capsys):
    options = CONTROL | {"optimizer": "sgd", "lr": 1e9, "warmup": 0, "clip": 0}
    assert cli.main(["train", *flags(steps=50, out=tmp_path / "run", **options)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("mlpint: error: 5 steps in a row were not finite") and err.count("\n") == 1
    assert "layer" in err and out.count("not finite; skipped") == 5
    skipped = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line.get("control", {}).get("skip")]
    assert len(skipped) == 4  # the fifth ended the run


def test_bf16(tmp_path):
    assert cli.main(["train", *flags(steps=5, out=tmp_path / "fp32")]) == 0
    assert cli.main(["train", *flags(steps=5, dtype="bf16", out=tmp_path / "bf16")]) == 0
    single, half = losses_of(tmp_path / "fp32"), losses_of(tmp_path / "bf16")
    assert half != single
    assert half == pytest.approx(single, rel=2e-2)


def make_trainer(**values):
    config = TrainConfig.of(SMALL | values)
    return Trainer(config, tasks.make(config), mlpint.Comm.of(None))


def test_comparison():
    trainer = make_trainer(forward_iters=1, backward_iters=1, coarse="injection", compare=2, consistency=0.0)
    for _ in range(5):
        trainer.train_step()
    weights = copy.deepcopy(trainer.model.state_dict())
    found = trainer.compare()
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), trainer.model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert found.seconds > 0 and found.exact_seconds > 0

    plain = GPT(256, 16, Shape(layers=10, dim=16, heads=2))
    plain.load_state_dict(weights)
    inputs, targets = trainer.task.train(5)
    F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten()).backward()
    trainer.forward_backward(5, 0, 5)
    exact = torch.cat([p.grad.flatten() for p in plain.parameters()])
    of_name = {name: p.grad if row is None else row(p.grad) for name, p, row in named_rows(trainer.model)}
    ours = torch.cat([of_name[name].flatten() for name, _ in plain.named_parameters()])
    assert found.gradient_error == pytest.approx(float((ours - exact).norm() / exact.norm()), rel=1e-3)
    assert found.gradient_cosine == pytest.approx(float(F.cosine_similarity(ours, exact, 0)), rel=1e-5)
    assert found.gradient_error > 1e-3

    enough = make_trainer(forward_iters=3, backward_iters=3, compare=1).compare()
    assert enough.gradient_error < 1e-5 and enough.gradient_cosine == pytest.approx(1)


def test_comparison_weighs_both_ways_alike():
    trainer, calls = make_trainer(), []

    def note(n):
        calls.append((n, trainer.blocks.options.exact))
        trainer.forward_backward(0, n, n)

    compare(trainer.model, trainer.blocks, note, 4, trainer.comm)
    assert calls[:2] in ([(0, False), (0, True)], [(0, True), (0, False)])
    assert sorted(calls[2:]) == [(n, way) for n in range(4) for way in (False, True)]
    assert sorted(way for _, way in calls[2::2]) == [False, False, True, True]  # neither is always first


class Successor(torch.nn.Module):
    """Puts all probability on the next number, or the given probabilities on 0, 1, ..."""

    def __init__(self, probabilities=None):
        super().__init__()
        self.probabilities = probabilities

    def forward(self, tokens):
        assert tokens.shape[1] <= 4
        if self.probabilities is not None:
            return torch.tensor(self.probabilities).log().expand(1, tokens.shape[1], -1)
        return 1000.0 * F.one_hot(tokens + 1, 50).float()


def test_generated_tokens_follow_the_model():
    comm = mlpint.Comm.of(None)
    assert generate(Successor(), [3, 4], 6, sequence=4, seed=0, comm=comm) == [5, 6, 7, 8, 9, 10]
    drawn = generate(Successor([0.2, 0.0, 0.8]), [0], 2000, sequence=4, seed=0, comm=comm, temperature=1.0)
    assert set(drawn) == {0, 2} and 0.17 < drawn.count(0) / 2000 < 0.23
    assert drawn == generate(Successor([0.2, 0.0, 0.8]), [0], 2000, sequence=4, seed=0, comm=comm, temperature=1.0)
    assert drawn != generate(Successor([0.2, 0.0, 0.8]), [0], 2000, sequence=4, seed=1, comm=comm, temperature=1.0)


def test_resumed_metrics_drop_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, {"ranks": 1})
    for step in (1, 2, 3):
        first.write({"step": step})
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')
    Metrics(path, {"ranks": 2}, resumed_at=2).write({"step": 3})
    assert read_lines(path) == [{"ranks": 1}, {"step": 1}, {"step": 2}, {"ranks": 2}, {"step": 3}]
    path.write_text("no json\n{}\n")
    with pytest.raises(mlpint.errors.UserError, match="line 1 is not a JSON object"):
        read_lines(path)


def test_smoothed_curve_keeps_a_constant():
    assert plots._smoothed([2.0] * 50, [0, *range(3, 52)]) == pytest.approx([2.0] * 50)
    rising = plots._smoothed(range(50), range(50))
    assert all(0 <= value < n for n, value in enumerate(rising) if n) and rising == sorted(rising)
    assert plots._smoothed([9.0, 9.0, 1.0, 1.0], [0, 1, 1001, 1002])[2:] == pytest.approx([1.0, 1.0])


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "MPI library" in out and "none, 1 rank" in out


# --- several ranks ---------------------------------------------------------------------------------------------------


def launched(launcher, ranks, *arguments):
    return run(COMMAND, ranks, launcher, args=("train", *map(str, arguments)))


RANKS = {"steps": 6, "checkpoint_every": 3, "dropout": 0.1, "cfactor": 2, "coarse": "fitted"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks print and write who train ("run"), then go on from the middle of that ("again")."""
    directory = tmp_path_factory.mktemp("two")
    start = directory / "run" / "checkpoints" / "step-00000003"
    first = ["train", "--trace", *flags(**RANKS, sample=5, compare=1, out=directory / "run")]
    second = ["train", f"--resume={start}", f"--out={directory}/again", "--compare=0"]
    program = f"import sys; from mlpint.cli import main; sys.exit(main({first}) or main({second}))"
    return run(program, 2, "mpich").check(), directory


def test_two_ranks_train_as_one_does(two_ranks, tmp_path):
    result, directory = two_ranks[0], two_ranks[1] / "run"
    assert "2 ranks over mpi" in result.stdout and "cosine" in result.stdout and result.stderr == ""
    assert result.stdout.count("step 6/6") == 2
    assert read_lines(directory / "metrics.jsonl")[0]["ranks"] == 2
    assert cli.main(["train", *flags(**RANKS, sample=5, compare=1, out=tmp_path / "one")]) == 0
    assert losses_of(directory) == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    ours, theirs = (steps_of(d)[-1]["val_loss"] for d in (directory, tmp_path / "one"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    (ours,), (theirs,) = (
        [line["comparison"] for line in read_lines(d / "metrics.jsonl") if "comparison" in line]
        for d in (directory, tmp_path / "one")
    )
    assert ours["gradient_error"] == pytest.approx(theirs["gradient_error"], rel=1e-2)
    assert ours["gradient_cosine"] == pytest.approx(theirs["gradient_cosine"], rel=1e-5)


def test_a_trace_has_all_ranks_on_one_clock(two_ranks, tmp_path, capsys):
    directory = two_ranks[1] / "run"
    events = [e for e in json.loads((directory / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert (directory / "trace.png").read_bytes().startswith(b"\x89PNG")
    steps = {(e["pid"], e["args"]["number"]): e for e in events if e["name"] == "step"}
    assert sorted(steps) == [(rank, step) for rank in (0, 1) for step in (4, 5, 6)]
    for (rank, step), whole in steps.items():
        inside = [e for e in events if e["pid"] == rank and whole["ts"] <= e["ts"] < whole["ts"] + whole["dur"]]
        assert all(e["ts"] + e["dur"] <= whole["ts"] + whole["dur"] + 1 for e in inside)
        kinds = ("chain", "relaxation", "last sweep", "serial layers", "wait", "head", "optimiser")
        parts = sorted((e["ts"], e["ts"] + e["dur"]) for e in inside if e["name"] in kinds)
        assert all(end <= begin + 1 for (_, end), (begin, _) in itertools.pairwise(parts))  # one thing at a time
        # (2,1), cf 2: each own layer has its last visit in both directions once, forwards with what a chain has taken.
        own = range(0, 5) if rank == 0 else range(5, 10)
        visited = [
            n for e in inside if e["name"] == "last sweep" and e["cat"] == "backward" for n in e["args"]["layers"]
        ]
        serial = [
            n for e in inside if e["name"] == "serial layers" and e["cat"] == "backward" for n in e["args"]["layers"]
        ]
        chained = [n for e in inside if e["name"] == "chain" and e["cat"] == "backward" for n in e["args"]["layers"]]
        assert {*visited, *serial, *chained} == {*own}, (rank, step, visited, serial, chained)
        assert {e["args"]["iteration"] for e in inside if e["name"] == "chain" and e["cat"] == "forward"} == {1, 2}
    # Rank 1's first chain in a step waits for the message that rank 0 sends after its own first one.
    everything = json.loads((directory / "trace.json").read_text())["traceEvents"]
    sent = [e for e in everything if e["name"] == "message" and e["cat"] == "forward" and e["args"]["in"] == "chain"]
    assert sent and all((e["pid"], e["args"]["to"]) == (0, 1) for e in sent)
    for step in (4, 5, 6):
        begin, end = (steps[0, step]["ts"] + d for d in (0, steps[0, step]["dur"]))
        chains = [e["ts"] for e in events if e["name"] == "chain" and e["cat"] == "forward" and e["pid"] == 1]
        own = sorted(e["ts"] for e in sent if begin <= e["ts"] < end)
        assert len(own) == 2 and own[0] < min(t for t in chains if begin <= t < end)
    capsys.readouterr()
    assert cli.main(["report", str(directory), "--out", str(tmp_path / "a.png")]) == 0
    assert f"{tmp_path}/a-trace.png" in capsys.readouterr().out and (tmp_path / "a-trace.png").exists()
    (tmp_path / "trace.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_bytes((directory / "metrics.jsonl").read_bytes())
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "b.png")]) == 2
    assert "is no trace of mlpint train" in capsys.readouterr().err


def test_error_control_decides_on_two_ranks_as_on_one(tmp_path):
    arguments = flags(steps=6, **CONTROL)
    launched("mpich", 2, *arguments, f"--out={tmp_path}/two").check()
    assert cli.main(["train", *arguments, f"--out={tmp_path}/one"]) == 0
    ours, theirs = checks_of(tmp_path / "two"), checks_of(tmp_path / "one")
    for mine, other in zip(ours, theirs, strict=True):
        assert all(mine[key] == other[key] for key in ("step", "action", "before", "after"))
        assert mine["measured"]["cosine"] == pytest.approx(other["measured"]["cosine"], rel=1e-5)


def test_two_ranks_resume_bit_for_bit(two_ranks):
    _, directory = two_ranks
    assert losses_of(directory / "again") == losses_of(directory / "run")[3:]
    assert weights(directory / "again") == weights(directory / "run")


def test_one_rank_goes_on_with_what_two_have_begun(two_ranks, tmp_path):
    directory = two_ranks[1] / "run"
    start = directory / "checkpoints" / "step-00000003"
    assert cli.main(["train", f"--resume={start}", f"--out={tmp_path}/run", "--compare=0"]) == 0
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(directory)[3:], rel=1e-5)


STOPPED = """
import os, signal, sys
from mlpint.cli import main
from mlpint.training.trainer import Trainer

train_step, number, rank = Trainer.train_step, int(sys.argv.pop(1)), int(sys.argv.pop(1))

def step(self, phase=None):
    if self.step == 1 and self.comm.rank == rank:
        os.kill(os.getpid(), number)
    return train_step(self, phase)

Trainer.train_step = step
sys.exit(main())
"""


@pytest.mark.parametrize(("number", "launcher", "ranks"), [(2, "mpich", 2), (15, "alone", 1)])
def test_a_signal_ends_the_step_and_the_run_can_go_on(number, launcher, ranks, two_ranks, tmp_path):
    """SIGINT and SIGTERM, also where one rank alone has it: a checkpoint, the curve, the shell's exit code."""
    arguments = ["train", *flags(**RANKS, compare=1, out=tmp_path / "run")]
    result = run(STOPPED, ranks, launcher, args=(str(number), str(ranks - 1), *arguments))
    assert result.returncode == 128 + number and not result.orphans
    name = {2: "SIGINT", 15: "SIGTERM"}[number]
    told = f"mlpint: {name}: stopped after step 2; resume with mlpint train --resume {tmp_path}/run"
    assert [line for line in result.stderr.splitlines() if "mlpint" in line] == [told]
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 2 and (tmp_path / "run" / "loss.png").exists()
    launched(launcher, ranks, f"--resume={tmp_path}/run").check()
    if ranks == 2:
        assert losses_of(tmp_path / "run") == losses_of(two_ranks[1] / "run")


@pytest.mark.parametrize(("launcher", "ranks"), [("mpich", 3), ("torchrun", 2)])
def test_other_ranks_go_on_with_what_two_have_begun(launcher, ranks, two_ranks, tmp_path):
    directory = two_ranks[1] / "run"
    start = directory / "checkpoints" / "step-00000003"
    launched(launcher, ranks, f"--resume={start}", f"--out={tmp_path}/run", "--compare=0").check()
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(directory)[3:], rel=1e-5)
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[0]["ranks"] == ranks


def test_replicas_train_as_accumulated_microbatches_do(tmp_path):
    """Two replicas of two ranks; dropout too is that of the same microbatches. One rank takes up what they began."""
    options = {"steps": 6, "checkpoint_every": 3, "dropout": 0.1, "levels": 1, "eval_batches": 3}
    launched("mpich", 4, *flags(**options, data_parallel=2, out=tmp_path / "mesh")).check()
    assert cli.main(["train", *flags(**options, accumulate=2, out=tmp_path / "one")]) == 0
    mesh, one = steps_of(tmp_path / "mesh"), steps_of(tmp_path / "one")
    for key in ("loss", "grad_norm", "flops", "tokens"):
        assert [line[key] for line in mesh] == pytest.approx([line[key] for line in one], rel=1e-5), key
    assert mesh[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)
    start = tmp_path / "mesh" / "checkpoints" / "step-00000003"
    again = [f"--resume={start}", "--data-parallel=1", "--accumulate=2", f"--out={tmp_path}/again"]
    assert cli.main(["train", *again]) == 0
    assert losses_of(tmp_path / "again") == pytest.approx(losses_of(tmp_path / "mesh")[3:], rel=1e-5)


def test_wrong_input_ends_all_ranks_with_one_line(tmp_path):
    result = launched("mpich", 2, "--cfactor=1", f"--out={tmp_path}/run")
    assert (result.returncode, result.stdout, result.orphans) == (2, "", ())
    assert result.stderr == "mlpint: error: cfactor = 1: must be an integer of at least 2\n"
    assert not (tmp_path / "run").exists()


def test_damage_that_one_rank_alone_sees_ends_all_ranks_with_one_line(two_ranks, tmp_path):
    directory = two_ranks[1] / "run"
    damaged = tmp_path / "step-00000003"
    damaged.mkdir()
    for file in (directory / "checkpoints" / "step-00000003").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    path = damaged / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    result = launched("mpich", 2, "--resume", damaged, f"--out={tmp_path}/run")
    assert (result.returncode, result.stdout, result.orphans) == (2, "", ())
    assert result.stderr.count("\n") == 1 and str(path) in result.stderr
    assert not (tmp_path / "run").exists()


NOT_FINITE = """
import sys, torch
from mlpint import cli
from mlpint.training import command
from mlpint.training.trainer import Trainer
class Faulty(Trainer):
    def forward_backward(self, step, microbatch, position):
        loss = super().forward_backward(step, microbatch, position)
        if step in {steps} and 6 in self.blocks.local_layers:  # of one rank alone
            next(self.blocks.local_layers[6].parameters()).grad[0] = float("{value}")
        return loss
    def training_loss(self, step, microbatch, position):
        poisoned = step == 5 and {forward} and 7 in self.blocks.local_layers  # it is in the coarse chain too
        parameter = next(self.blocks.local_layers[7].parameters()) if poisoned else None
        if poisoned:
            kept = parameter.detach().clone()
            parameter.data[0] = float("nan")
        loss = super().training_loss(step, microbatch, position)
        if poisoned:
            parameter.data.copy_(kept)
        return loss
command.Trainer = Faulty
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("steps", "value", "control"),
    [
        ([1, 3], "inf", "gradient"),
        (range(1, 30), "nan", "gradient"),
        ([1, 3], "nan", "off"),
        (range(1, 30), "inf", "off"),
    ],
)
def test_one_ranks_gradient_that_is_no_number_is_named_and_never_taken(steps, value, control, tmp_path):
    options = CONTROL | {"control": control, "accumulate": 1, "control_every": 100, "control_target": 1e-6}
    arguments = flags(steps=6 if len(steps) == 2 else 30, out=tmp_path / "run", **options)
    program = NOT_FINITE.replace("{steps}", str(list(steps))).replace("{value}", value)
    program = program.replace("{forward}", str(value == "nan" and control == "off"))
    result = run(program, 2, "mpich", args=("train", "--no-stacked", *arguments))
    named = "the gradients of 1 of 10 layers are not finite: 6 (rank 1)"
    if len(steps) == 2:
        result.check()
        forward = control == "off"  # in one step the states are not finite, from that layer on
        assert result.stdout.count(named) == 2, result.stdout
        if forward:
            assert result.stdout.count("not finite; skipped, 1 in a row") == 3 and "loss nan" in result.stdout
            assert "skipped    3 steps that were not finite" in result.stdout, result.stdout
        written = losses_of(tmp_path / "run")
        assert len(written) == 4 - forward and all(map(math.isfinite, written))
    else:
        assert result.returncode == 1 and not result.orphans, result.describe()
        assert named in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert "steps in a row were not finite" in result.stderr and len(losses_of(tmp_path / "run")) == 1


def test_the_consistency_term(tmp_path):
    """Two ranks as one, accumulated or not; its size is in the log; with what it is not for it is refused."""
    options = {"forward_iters": 1, "coarse": "injection", "cfactor": 2, "control": "off", "batch": 2, "steps": 4}
    options["optimizer"] = "muon"
    late = {"accumulate": 2, "consistency_start": 3}
    for out, more in (("a", {"batch": 4}), ("b", {"accumulate": 2}), ("c", late)):
        arguments = flags(out=tmp_path / out, **{"consistency": 0.5} | options | more)
        assert cli.main(["train", *arguments]) == 0
    launched("mpich", 2, *flags(out=tmp_path / "d", **options, accumulate=2, consistency=0.5)).check()
    errors = {n: [line.get("relative_error") for line in steps_of(tmp_path / n)] for n in "abcd"}
    assert errors["c"][:3] == [None] * 3 and errors["c"][3] > 0
    assert errors["d"] == pytest.approx(errors["b"], rel=1e-3)  # Muon makes its steps orthogonal in bfloat16
    assert losses_of(tmp_path / "d") == pytest.approx(losses_of(tmp_path / "b"), rel=1e-4) != losses_of(tmp_path / "c")
    assert all(e > 0 for e in errors["a"])


def test_ranks_that_disagree_are_told_before_training(tmp_path):
    program = """
    import os, sys
    from mlpint.cli import main
    sys.exit(main([*sys.argv[1:], f"--seed={os.environ['PMI_RANK']}"]))
    """
    result = run(program, 2, "mpich", args=("train", *flags(steps=1, out=tmp_path / "run")))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "seed is 0 on rank 0, 1 on rank 1" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_rank_that_cannot_start_tells_why():
    """Rank 1 alone has no MPI library, while rank 0 waits for it; or no NCCL, which rank 0 hears of."""
    no_mpi = """
    import os, sys
    if os.environ["PMI_RANK"] == "1":
        os.environ["MPI4PY_LIBMPI"] = "/nowhere/libmpi.so"
    from mlpint.cli import main
    sys.exit(main(["train", "--steps=1"]))
    """
    result = run(no_mpi, 2, "mpich", env={"MLPINT_STALL_LIMIT": "8"})
    assert result.returncode not in (0, -9) and result.stdout.count("step 1") == 0 and not result.orphans, (
        result.describe()
    )
    assert result.stderr.count("there is no MPI library") == 1, result.stderr
    assert "mlpint: error on rank 1: rank 1 of 2 was started by" in result.stderr
    no_nccl = """
    import os, sys
    import mlpint.comm.nccl as nccl
    from mlpint.cli import main
    join = nccl.nccl_transport
    nccl.own_gpu_each = nccl.is_installed = lambda comm: True
    nccl.nccl_transport = lambda control, device: join(control, device, "no-such-libnccl.so", host_memory=True)
    if os.environ["PMI_RANK"] == "0":
        nccl._core = type("Core", (), {"NcclLibrary": lambda names: None})
    sys.exit(main(["train", "--steps=1"]))
    """
    result = run(no_nccl, 3, "mpich")
    assert result.returncode not in (0, -9) and not result.orphans, result.describe()
    assert [result.stderr.count(f"error on rank {rank}: cannot load NCCL") for rank in (1, 2)] == [1, 1], result.stderr
    assert result.stderr.count("mlpint: error: rank 0: NCCL cannot be used on 2 of 3 ranks, see their messages") == 1


def test_what_the_ranks_do_not_allow_ends_all_ranks_with_one_line(tmp_path):
    for options, text in (
        ({"layout": "cyclic", "cfactor": 3, "coarse": "sum"}, "their number, 2, must be a multiple of cfactor"),
        ({"layout": "cyclic", "cfactor": 2}, "coarse='sum'"),
        ({"coarse": "sum", "cfactor": 2, "levels": 3, "layers": 14}, "are on ranks"),
        ({"coarse": "sum", "cfactor": 2, "consistency": 0.1}, "not 'sum'"),
    ):
        result = launched("mpich", 2, *flags(steps=1, out=tmp_path / "run", **options))
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and text in result.stderr, result.stderr
        assert not (tmp_path / "run").exists()


def test_the_cyclic_layout_and_the_pipeline_train(tmp_path):
    launched("mpich", 2, *flags(steps=2, out=tmp_path / "a", layout="cyclic", coarse="sum", cfactor=2)).check()
    launched("mpich", 2, *flags(steps=2, out=tmp_path / "b", levels=1, serial_microbatches=2)).check()
    launched("mpich", 2, *flags(steps=2, out=tmp_path / "c", chain_slices=0)).check()
    launched("mpich", 2, *flags(steps=2, out=tmp_path / "d")).check()
    assert losses_of(tmp_path / "c") == pytest.approx(losses_of(tmp_path / "d"), rel=1e-5)
    assert losses_of(tmp_path / "b") == pytest.approx(plain_losses(2)[0], rel=1e-5)
    assert losses_of(tmp_path / "a") == pytest.approx(plain_losses(2)[0], rel=1e-2)
