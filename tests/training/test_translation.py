"""The translation task: trained as plain PyTorch trains the same model, alone and on two ranks; BLEU; bad input."""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch

from launch import run
from mlpint import cli
from mlpint.comm.communicator import Comm
from mlpint.training import tasks
from mlpint.training.config import TrainConfig, read_toml
from mlpint.training.data.bpe import PAD
from mlpint.training.metrics import read_lines
from mlpint.training.trainer import Trainer
from refusal import fails

GERMAN = "null eins zwei drei vier fünf sechs sieben".split()
ENGLISH = "zero one two three four five six seven".split()
SMALL = {"task": "translation", "layers": 6, "dim": 16, "heads": 2, "ffn": 24, "open_layers": 1, "close_layers": 1}
SMALL |= {"cfactor": 2, "batch": 8, "sequence": 32, "vocabulary": 320, "lr": 1e-2, "warmup": 2, "clip": 0.0}
SMALL |= {"beta2": 0.999, "weight_decay": 0.0, "compare": 0, "eval_batches": 0, "threads": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MLPINT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def data(tmp_path):
    """Numbers, word by word."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 300), ("val", 20), ("test", 20)):
        numbers = [rng.integers(8, size=rng.integers(1, 7)).tolist() for _ in range(count)]
        for name, words in (("de", GERMAN), ("en", ENGLISH)):
            lines = [" ".join(words[n] for n in row) + " .\n" for row in numbers]
            (tmp_path / f"numbers-{split}.{name}").write_text("".join(lines))
    return tmp_path / "numbers"


def flags(**values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | values).items()]


def config(**values):
    return TrainConfig.of(SMALL | {name: str(v) if name == "data" else v for name, v in values.items()})


def steps_of(directory):
    return [line for line in read_lines(directory / "metrics.jsonl") if "loss" in line]


def plain_loss(model, batch, smoothing=0.0):
    """Sum of -log p of the wanted tokens without padding, and their number; smoothing gives all tokens a share."""
    source, lengths, given, wanted = batch
    total, count = 0.0, 0
    for row in range(len(source)):  # one pair at a time, without any padding
        n = int((wanted[row] != PAD).sum())
        logits = model(source[row : row + 1, : lengths[row]], lengths[row : row + 1], given[row : row + 1, :n])
        p = logits[0].log_softmax(-1)
        chosen = p.gather(1, wanted[row, :n, None])[:, 0]
        total = total - ((1 - smoothing) * chosen + smoothing * p.mean(-1)).sum()
        count += n
    return total, count


def test_exact_training_is_plain_training(data, tmp_path):
    smoothed = {"label_smoothing": 0.1, "steps": 5, "data": data, "step_size": 1.0}
    task = tasks.make(config(**smoothed))
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    expected = []
    for step in range(5):
        total, count = plain_loss(model, task.train(step), 0.1)
        optimizer.zero_grad()
        (total / count).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 2 if step < 2 else 0.1 + 0.45 * (1 + np.cos(np.pi * (step - 2) / 2)))
        optimizer.step()
        expected.append(float(total.detach()) / count)
    with torch.no_grad():
        found = [plain_loss(model, task.validation(i, 3)) for i in range(3)]
    assert cli.main(["train", *flags(**smoothed, levels=1, out=tmp_path / "run")]) == 0
    lines = steps_of(tmp_path / "run")
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)
    total, count = (sum(float(part[i]) for part in found) for i in range(2))
    assert lines[-1]["val_loss"] == pytest.approx(total / count, rel=1e-4)
    assert lines[-1]["sentences"] == 5 * 8
    written = (tmp_path / "run" / "sample.txt").read_text().splitlines()
    references = (tmp_path / "numbers-test.en").read_text().splitlines()
    test_line = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "test_bleu" in line]
    assert len(written) == 20
    assert test_line[0]["test_bleu"] == pytest.approx(sacrebleu.corpus_bleu(written, [references]).score)


def test_translations_are_the_models_own(data):
    """Greedy and by beams, they are what the model itself gives token by token, and in the order of the sentences."""
    task = tasks.make(config(data=data, batch=7))
    torch.manual_seed(1)
    model = task.model().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    which = np.array([5, 0, 11, 3, 17, 8, 2, 9, 14])
    comm, cpu = Comm.of(None), torch.device("cpu")
    greedy = task.translate(model, "validation", which, 1, cpu, comm)
    for n, text in zip(which, greedy, strict=True):
        source, lengths, _, _ = task.pairs["validation"].batch(np.array([n]))
        tokens = [1]
        with torch.no_grad():
            while tokens[-1] != 2 and len(tokens) < min(32, 2 * int(lengths) + 10) + 1:
                logits = model(source, lengths, torch.tensor([tokens]))[0, -1]
                logits[[0, 1]] = -torch.inf
                tokens.append(int(logits.argmax()))
        assert text == task.bpe.decode(tokens)
    beams = task.translate(model, "validation", which, 3, cpu, comm)
    assert len(beams) == len(which) and beams != greedy
    assert not any(p.is_meta for p in model.parameters())


def test_it_learns(data, tmp_path, capsys):
    options = {"data": data, "steps": 260, "layers": 4, "dim": 32, "heads": 4, "ffn": 64, "batch": 24, "lr": 6e-3}
    options |= {"levels": 1, "eval_every": 0, "out": tmp_path / "run", "beams": 3, "weight_decay": 0.01, "clip": 1.0}
    assert cli.main(["train", *flags(**options)]) == 0
    last = steps_of(tmp_path / "run")[-1]
    test_bleu = [line["test_bleu"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "test_bleu" in line]
    assert last["val_bleu"] > 80 and test_bleu[0] > 80, (last, test_bleu)
    out = capsys.readouterr().out
    assert "de -> en, pairs: 300 train, 20 validation, 20 test" in out and "test, 20 sentences, 3 beams: BLEU" in out


def test_two_ranks_train_resume_and_translate_as_one_does(data, tmp_path):
    options = {"data": data, "steps": 4, "dropout": 0.1, "checkpoint_every": 2, "forward_iters": 1, "step_size": 0.5}
    options |= {"compare": 1}
    again = ["train", f"--resume={tmp_path}/two/checkpoints/step-00000002", f"--out={tmp_path}/again"]
    runs = [["train", *flags(**options, out=tmp_path / "two")], again]
    program = f"import sys; from mlpint.cli import main; sys.exit(max(main(run) for run in {runs}))"
    assert run(program, 2, "mpich").check().stderr == ""
    assert cli.main(["train", *flags(**options, out=tmp_path / "one")]) == 0
    two, one, later = (steps_of(tmp_path / name) for name in ("two", "one", "again"))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=2e-5)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=2e-5)
    assert two[-1]["val_bleu"] == pytest.approx(one[-1]["val_bleu"], abs=0.5)
    assert [line["loss"] for line in later] == [line["loss"] for line in two[2:]]
    texts = [(tmp_path / name / "sample.txt").read_text() for name in ("two", "one", "again")]
    assert texts[0] == texts[2] and len(texts[0].splitlines()) == len(texts[1].splitlines()) == 20


@pytest.mark.parametrize("values", [{"levels": 1}, {"levels": 1, "step_size": 0.5}, {"step_size": 0.5}])
def test_gradients_of_the_first_pass_are_those_of_the_next_to_the_bit(data, values):
    """Sums of several parts, of a state of two tensors, come in one order whatever is known of the layers."""
    trainer = Trainer(
        config(data=data, control="off", **values), tasks.make(config(data=data, **values)), Comm.of(None)
    )
    found = []
    for _ in range(2):
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.forward_backward(0, 0, 0)
        found.append([p.grad for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_encoder_may_be_larger(data):
    task = tasks.make(config(data=data, encoder_layers=3, open_layers=1))
    kinds = [type(layer).__name__ for layer in task.model().blocks]
    assert kinds == 3 * ["EncoderBlock"] + 3 * ["DecoderBlock"]
    task = tasks.make(config(data=data, encoder_layers=5))
    assert [type(layer).__name__ for layer in task.model().blocks].count("EncoderBlock") == 5


@pytest.mark.parametrize(
    ("values", "spans"),
    [
        ({"encoder_layers": 4}, True),  # layers 3 and 4 are one interval
        ({"encoder_layers": 3}, False),
        ({"encoder_layers": 5}, False),
        ({"encoder_layers": 1}, False),
        ({"encoder_layers": 4, "levels": 1}, False),
        ({"encoder_layers": 4, "coarse": "sum"}, False),
        ({"layers": 8, "encoder_layers": 3, "levels": 3}, True),
    ],
)
def test_intervals_that_span_both_parts_are_told(values, spans, data):
    assert tasks.make(config(data=data, **values)).describe().endswith("spans both encoder and decoder") == spans


def test_the_example_fits(data):
    example = read_toml(Path(__file__).parents[2] / "examples" / "translation.toml")
    model = tasks.make(TrainConfig.of(example | {"data": str(data)})).model()
    assert len(model.blocks) == 12 and model.dim == 128


def test_tokens_are_made_once(data, monkeypatch):
    first = tasks.make(config(data=data))
    monkeypatch.setattr("mlpint.training.data.bpe.BytePairs.learn", None)
    second = tasks.make(config(data=data))
    assert second.digest() == first.digest() and second.identity() == first.identity()
    assert isinstance(second.pairs["train"].source.tokens, np.memmap)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_told_before_the_first_step(data, tmp_path, capsys):
    (tmp_path / "long-train.de").write_text("eins\nzwei\n" + " ".join(GERMAN * 4) + "\n")
    (tmp_path / "long-train.en").write_text("one\ntwo\nthree\n")
    for arguments, words in (
        ({}, "data = '': must name parallel text"),
        ({"data": tmp_path / "nothing"}, "nothing: no parallel text; looked for"),
        ({"data": data, "source": "en"}, "target = 'en': must be another language than source"),
        ({"data": data, "target": "fr"}, "numbers-train.de: there is no such file that ends in .fr"),
        ({"data": data, "vocabulary": 200}, "vocabulary = 200: must be at least 259"),
        ({"data": data, "encoder_layers": 6}, "encoder_layers = 6: must leave each of encoder and decoder"),
        ({"data": data, "batch": 301}, "300 pairs to train on are too few for batch = 301"),
        ({"data": tmp_path / "long", "batch": 1}, "long-train.de: line 3 has"),
        ({"data": data, "sequence": 3}, "more than sequence = 3; give --sequence"),
    ):
        assert words in fails(tmp_path, capsys, *flags(**arguments)), arguments


@pytest.mark.parametrize("package", ["tokenizers", "sacrebleu"])
def test_a_missing_package_is_named(package, data, tmp_path, capsys, monkeypatch):
    version = importlib.metadata.version

    def lacking(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", lacking)
    line = fails(tmp_path, capsys, *flags(data=data))
    assert f"needs the package {package}, which is not installed; pip install 'mlpint[text]'" in line


def test_a_checkpoint_of_another_vocabulary_is_refused(data, tmp_path, capsys):
    assert cli.main(["train", *flags(data=data, steps=1, checkpoint_every=1, sample=0, out=tmp_path / "run")]) == 0
    capsys.readouterr()
    for split in ("train", "val", "test"):
        for language in ("de", "en"):
            text = (tmp_path / f"numbers-{split}.{language}").read_text()
            (tmp_path / f"other-{split}.{language}").write_text(text.replace("e", "ee"))
    line = fails(tmp_path, capsys, f"--resume={tmp_path}/run", "--steps=2", f"--data={tmp_path}/other")
    assert "vocabulary is" in line and "digest" in line
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json").read_text())
    assert saved["content"]["info"]["task"]["vocabulary"].split(",")[0] in line
