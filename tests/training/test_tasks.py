"""Tasks of `mlpint train`: each trained as plain PyTorch trains the same model, alone and on two ranks; bad data."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import mlpint
from launch import run
from mlpint import cli
from mlpint.nn.stack import named_rows
from mlpint.training import tasks
from mlpint.training.config import TrainConfig
from mlpint.training.metrics import read_lines
from mlpint.training.models import BERT, Shape, Tagger, ViT
from mlpint.training.trainer import Trainer
from refusal import fails

SMALL = {"layers": 6, "dim": 16, "heads": 2, "ffn": 24, "open_layers": 1, "close_layers": 1, "cfactor": 2}
SMALL |= {"batch": 4, "sequence": 16, "lr": 1e-2, "warmup": 2, "compare": 0, "eval_batches": 0, "threads": 1}
SMALL |= {"forward_iters": 2, "coarse": "fitted", "beta2": 0.999}  # which learns; without the consistency term


def flags(**values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | values).items()]


def steps_of(directory):
    return [line for line in read_lines(directory / "metrics.jsonl") if "loss" in line]


def treebank(sentences, tags=("DET", "NOUN", "VERB")):
    """CoNLL-U in which every word's ending says its tag."""
    lines = []
    for n in range(sentences):
        lines += [f"# sent_id = s{n}"]
        for place in range(2 + n % 7):
            tag = tags[(n + place) % len(tags)]
            lines.append("\t".join([str(place + 1), f"w{n * place % 11}{tag.lower()}", "_", tag, *"______"]))
        lines.append("")
    return "\n".join(lines) + "\n"


@pytest.fixture
def data(tmp_path):
    """Task -> the keys that give it something small to learn."""
    rng = np.random.default_rng(0)
    (tmp_path / "bank.conllu").write_text(treebank(60))
    labels = np.arange(90) % 3
    images = rng.integers(0, 60, (90, 4, 6), np.uint8)
    images[np.arange(90), labels] += 190  # the row of its number is bright
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    (tmp_path / "text.txt").write_text("".join(letter * 30 for letter in "abcdefgh" * 12))
    return {
        "tagging": {"task": "tagging", "data": tmp_path / "bank.conllu"},
        "vit": {"task": "vit", "data": tmp_path / "images.npz", "patch": 2},
        "bert": {"task": "bert", "data": tmp_path / "text.txt"},
    }


def logits_and_targets(task, model, batch):
    if task == "bert":
        inputs, places, targets = batch
        logits = torch.stack([row[at] for row, at in zip(model(inputs), places, strict=True)])
        return logits.flatten(0, 1), targets.flatten()
    if task == "vit":
        return model(batch[0]), batch[1]
    features, tags, lengths = batch
    logits = model(features, lengths)
    rows = [(logits[i, :n], tags[i, :n]) for i, n in enumerate(lengths)]
    return torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows])


@pytest.mark.parametrize("name", ["bert", "vit", "tagging"])
def test_exact_training_is_plain_training(name, data, tmp_path):
    values = SMALL | data[name] | {"data": str(data[name]["data"]), "steps": 6, "clip": 0, "weight_decay": 0.0}
    task = tasks.make(TrainConfig.of(values))
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    expected = []
    for step in range(6):
        loss = F.cross_entropy(*logits_and_targets(name, model, task.train(step)))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 2 if step < 2 else 0.1 + 0.45 * (1 + np.cos(np.pi * (step - 2) / 3)))
        optimizer.step()
        expected.append(loss.item())
    with torch.no_grad():
        count = task.held_out_batches
        found = [logits_and_targets(name, model, task.validation(i, count)) for i in range(count)]
        logits, targets = (torch.cat(part) for part in zip(*found, strict=True))
    arguments = {**data[name], "steps": 6, "clip": 0, "weight_decay": 0.0, "levels": 1}
    assert cli.main(["train", *flags(**arguments, out=tmp_path / "run")]) == 0
    lines = steps_of(tmp_path / "run")
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)
    assert lines[-1]["val_loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    assert lines[-1]["val_accuracy"] == pytest.approx(float((logits.argmax(-1) == targets).float().mean()), abs=1e-6)
    assert lines[-1][{"bert": "tokens", "vit": "images", "tagging": "sentences"}[name]] == 6 * task.per_batch
    assert (tmp_path / "run" / "sample.txt").stat().st_size > 0
    # The curve of accuracy lies below that of the loss: 9 x 6.5 inches instead of 9 x 4.5.
    width, height = (int.from_bytes((tmp_path / "run" / "loss.png").read_bytes()[at : at + 4]) for at in (16, 20))
    assert 9 * height == 6.5 * width


@pytest.mark.parametrize("name", ["bert", "vit", "tagging"])
def test_gradients_are_those_of_autograd(name, data):
    """In float64, with iterations enough for MGRIT to be exact, padding and step size 1/2 included."""
    values = SMALL | data[name] | {"data": str(data[name]["data"]), "step_size": 0.5}
    values |= {"forward_iters": 2, "backward_iters": 2}  # 4 layers between the buffers are 2 intervals
    config = TrainConfig.of(values)
    trainer = Trainer(config, tasks.make(config), mlpint.Comm.of(None))
    trainer.model.double()
    plain = trainer.task.model().double()
    plain.load_state_dict(trainer.model.state_dict())
    blocks = list(plain.blocks)

    def stepped(x, **arguments):
        for n, block in enumerate(blocks):
            new = block(x, **arguments)
            x = new if n in (0, len(blocks) - 1) else x + 0.5 * (new - x)
        return x

    plain.blocks.forward = stepped
    batch = tuple(t.double() if t.is_floating_point() else t for t in trainer.task.train(0))
    trainer.task.loss(trainer.model, batch).backward()
    F.cross_entropy(*logits_and_targets(name, plain, batch)).backward()
    ours = {n: p.grad if row is None else row(p.grad) for n, p, row in named_rows(trainer.model)}
    for n, p in plain.named_parameters():
        torch.testing.assert_close(ours[n], p.grad, rtol=1e-5, atol=1e-8, msg=n)  # losses are taken in float32
    assert float(plain.blocks[3].qkv.weight.grad.norm()) > 1e-6


def test_every_task_learns(data, tmp_path):
    larger = {"dim": 32, "batch": 16}
    for name, values, accuracy in (
        ("vit", {"steps": 60}, 0.9),
        ("tagging", {"steps": 60}, 0.9),
        ("bert", {"steps": 100, **larger}, 0.7),  # what is masked where one letter's run ends cannot be known
    ):
        out = tmp_path / name
        options = values | {"sample": 0, "levels": 1, "layers": 3, "eval_every": 0}
        assert cli.main(["train", *flags(**data[name] | options, out=out)]) == 0
        last = steps_of(out)[-1]
        assert last["val_accuracy"] > accuracy, (name, last)


def test_two_ranks_train_and_resume_as_one_does(data, tmp_path):
    """All tasks in one launch: with dropout, padding, inexact sweeps; then each goes on from its middle."""
    options = {"steps": 4, "dropout": 0.1, "checkpoint_every": 2, "forward_iters": 1, "compare": 1}
    runs = [["train", *flags(**options | data[name], out=tmp_path / name)] for name in data]
    runs += [
        ["train", f"--resume={tmp_path}/{name}/checkpoints/step-00000002", f"--out={tmp_path}/{name}-again"]
        for name in data
    ]
    program = f"import sys; from mlpint.cli import main; sys.exit(max(main(run) for run in {runs}))"
    result = run(program, 2, "mpich").check()
    assert result.stderr == ""
    for name in data:
        assert cli.main(["train", *flags(**options | data[name], out=tmp_path / f"{name}-alone")]) == 0
        ours, alone = steps_of(tmp_path / name), steps_of(tmp_path / f"{name}-alone")
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in ours] == pytest.approx([line[key] for line in alone], rel=2e-5)
        assert ours[-1]["val_accuracy"] == pytest.approx(alone[-1]["val_accuracy"], abs=0.03)
        again = steps_of(tmp_path / f"{name}-again")
        assert [line["loss"] for line in again] == [line["loss"] for line in ours[2:]]
        assert again[-1]["val_loss"] == ours[-1]["val_loss"]


# --- models ----------------------------------------------------------------------------------------------------------


def test_padding_changes_no_tag():
    model = Tagger(features=50, labels=5, sequence=9, shape=Shape(layers=3, dim=16, heads=2)).double().eval()
    features, lengths = torch.randint(1, 50, (3, 9, 4)), torch.tensor([4, 9, 1])
    together = model(features, lengths)  # what stands in the padding counts for nothing
    for row, length in enumerate(lengths):
        alone = model(features[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(together[row : row + 1, :length], alone)
    words = features.clone()
    words[1, 2] = 0
    assert not torch.allclose(model(words, lengths)[1, 8], together[1, 8])  # every word sees every other


def test_bert_names_the_tokens_at_the_given_places():
    model = BERT(vocabulary=20, sequence=8, shape=Shape(layers=2, dim=16, heads=2)).double().eval()
    tokens, places = torch.randint(20, (3, 8)), torch.tensor([[0, 5], [7, 2], [3, 4]])
    everywhere = model(tokens)
    assert everywhere.shape == (3, 8, 20)
    for row in range(3):
        torch.testing.assert_close(model(tokens, places)[row], everywhere[row, places[row]])
    lengths = torch.tensor([8, 5, 3])
    torch.testing.assert_close(model(tokens, lengths=lengths)[1, :5], model(tokens[1:2, :5])[0])


def test_vit_reads_patches_row_by_row():
    model = ViT((2, 4, 6), patch=2, classes=5, shape=Shape(layers=0, dim=8, heads=2)).double()
    model.embedding_norm = torch.nn.Identity()
    images = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    weight, bias = model.patches.weight.flatten(1), model.patches.bias
    states = []
    model.blocks.forward = lambda x: states.append(x) or x
    model(images)
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
            place = 3 * row + column
            expected = patch @ weight.T + bias + model.positions[0, 1 + place]  # 0 is the class token
            torch.testing.assert_close(states[0][:, 1 + place], expected)


def test_masks():
    config = TrainConfig.of(SMALL | {"task": "bert", "sequence": 50, "batch": 40, "mask": 0.2})
    other_seed = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    task, other = tasks.make(config), tasks.make(other_seed)
    inputs, places, targets = task.train(3)
    originals = task.batches.train(3)[0]
    assert places.shape == targets.shape == (40, 10) and all(len(set(row)) == 10 for row in places.tolist())
    assert torch.equal(originals.gather(1, places), targets)
    assert torch.equal(inputs.scatter(1, places, targets), originals)  # nothing else is changed
    shown = torch.cat([task.train(p)[0].gather(1, task.train(p)[1]).flatten() for p in range(20)])
    wanted = torch.cat([task.train(p)[2].flatten() for p in range(20)])
    assert 0.78 < float((shown == task.mask_token).double().mean()) < 0.82
    assert 0.085 < float((shown == wanted).double().mean()) < 0.12
    assert int(places.min()) == 0 and int(places.max()) == 49
    for one, two in zip(task.validation(1, 4), other.validation(1, 4), strict=True):
        assert torch.equal(one, two)  # the same for every seed
    assert not torch.equal(task.train(3)[1], other.train(3)[1]) and not torch.equal(task.train(4)[1], places)


def test_rare_words_are_hidden_at_times_and_held_out_ones_never(tmp_path):
    """A word seen n times is shown as unknown, all features that are as rare with it, in 1 of 1 + 2 n cases."""
    line = "1\t{}\t_\tNOUN" + "\t_" * 6 + "\n\n"
    (tmp_path / "bank.conllu").write_text((line.format("ox") + line.format("gnu") * 9) * 2 + line.format("ox") * 2)
    task = tasks.make(TrainConfig.of(SMALL | {"task": "tagging", "data": str(tmp_path / "bank.conllu"), "batch": 10}))
    assert len(task.training) == 20 and task.held_out[0].words == ["ox"]
    assert bool((task.validation(0, 1)[0][..., 0] > 0).all())
    shown = {"ox": [], "gnu": []}
    ox = task.features(["ox"])[0, 0]
    for position in range(2000):
        features = task.train(position)[0]
        rows = [task.training[i].words[0] for i in task.order(position)]
        for row, word in zip(features[:, 0, 0].tolist(), rows, strict=True):
            shown[word].append(row)
    assert set(shown["ox"]) == {0, ox}
    assert np.mean([row == 0 for row in shown["ox"]]) == pytest.approx(1 / 5, abs=0.02)
    assert np.mean([row == 0 for row in shown["gnu"]]) == pytest.approx(1 / 37, abs=0.01)


def test_shifted_images(data):
    values = SMALL | data["vit"] | {"data": str(data["vit"]["data"]), "augment": 1}
    task = tasks.make(TrainConfig.of(values))
    plain = tasks.make(TrainConfig.of(values | {"augment": 0}))
    seen = set()
    for position in range(18):
        (moved, labels), (images, same) = task.train(position), plain.train(position)
        assert torch.equal(labels, same)
        for one, other in zip(moved, images, strict=True):
            padded = F.pad(other[None], (1, 1, 1, 1), mode="replicate")[0]
            seen |= {(y, x) for y in range(3) for x in range(3) if torch.equal(padded[:, y : y + 4, x : x + 6], one)}
    assert len(seen) == 9


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_data_is_told_before_the_first_step(data, tmp_path, capsys):
    bank, images = treebank(8), data["vit"]["data"]
    (tmp_path / "empty.conllu").write_text("\n")
    (tmp_path / "label.conllu").write_text(bank.replace("VERB", "VRB", 1))
    (tmp_path / "columns.conllu").write_text(bank.replace("\t_\t_\n", "\n", 1))
    (tmp_path / "few.conllu").write_text(treebank(3))
    small = np.zeros((9, 3, 5), np.uint8)
    np.savez(tmp_path / "other.npz", images=small, labels=np.arange(9) % 3)
    np.savez(tmp_path / "unknown.npz", images=np.zeros((9, 4, 6), np.uint8), labels=np.arange(9) % 4)
    tokens = np.zeros(400_000, "<u2")
    tokens[123_456] = 500
    tokens.tofile(tmp_path / "tokens.bin")
    for arguments, words in (
        (["--task=tagging"], "data = '': must name a CoNLL-U file"),
        (["--task=tagging", f"--data={tmp_path}/nowhere"], "nowhere: cannot be read"),
        (["--task=tagging", f"--data={tmp_path}/empty.conllu"], "empty.conllu: is empty"),
        (["--task=tagging", f"--data={tmp_path}/label.conllu"], "label.conllu: line 7 has the tag 'VRB'; UPOS are ADJ"),
        (["--task=tagging", f"--data={tmp_path}/columns.conllu"], "columns.conllu: line 2 has 8 columns"),
        (["--task=tagging", f"--data={tmp_path}/few.conllu"], "2 examples to train on are too few for batch = 4"),
        (["--task=tagging", f"--data={data['tagging']['data']}", "--sequence=7"], "'s6' has 8 words, sequence = 7"),
        (["--task=vit", f"--data={images}", "--patch=3"], "patch = 3: must divide the images' size, 4 x 6"),
        (["--task=vit", f"--data={images}", f"--validation={tmp_path}/other.npz"], "images are 3 x 5 x 1, those of"),
        (["--task=vit", f"--data={images}", f"--validation={tmp_path}/unknown.npz"], "label 3 is unknown"),
        (["--task=vit", f"--data={data['bert']['data']}"], "text.txt: is not an .npz file"),
        (["--task=bert", f"--data={data['bert']['data']}", "--sequence=5000"], "are too few for sequence = 5000"),
        ([f"--data={tmp_path}/tokens.bin", "--vocabulary=500"], "token 500 is outside the vocabulary of 500"),
        (["--task=bert", f"--data={tmp_path}/tokens.bin", "--vocabulary=400"], "token 500 is outside the vocabulary"),
        (["--task=bert", f"--validation={tmp_path}/nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--task=chess"], "task = 'chess': must be one of gpt"),
    ):
        assert words in fails(tmp_path, capsys, *flags(), *arguments), arguments


def test_a_checkpoint_of_other_words_is_refused(data, tmp_path, capsys):
    options = data["tagging"] | {"steps": 1, "checkpoint_every": 1, "sample": 0, "out": tmp_path / "run"}
    assert cli.main(["train", *flags(**options)]) == 0
    capsys.readouterr()
    (tmp_path / "other.conllu").write_text(treebank(60, tags=("ADJ", "ADV", "X")))
    again = [f"--resume={tmp_path}/run", "--steps=2"]
    assert "vocabulary is" in fails(tmp_path, capsys, *again, f"--data={tmp_path}/other.conllu")
    assert "task = 'gpt': must be 'tagging'" in fails(tmp_path, capsys, *again, "--task=gpt")
    (tmp_path / "bigger.npz").write_bytes(b"")
    labels = np.arange(90) % 3
    np.savez(tmp_path / "bigger.npz", images=np.ones((90, 4, 4), np.uint8), labels=labels)
    options = data["vit"] | {"steps": 1, "checkpoint_every": 1, "sample": 0, "out": tmp_path / "vit"}
    assert cli.main(["train", *flags(**options)]) == 0
    capsys.readouterr()
    line = fails(tmp_path, capsys, f"--resume={tmp_path}/vit", "--steps=2", f"--data={tmp_path}/bigger.npz")
    assert "images is 1 x 4 x 4, that of" in line
