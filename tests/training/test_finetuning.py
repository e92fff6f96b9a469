"""Fine-tuning: classes of texts, and runs that start from another's weights, as plain PyTorch does it; bad input."""

import gzip
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import mlpint
from launch import run
from mlpint import cli
from mlpint.errors import DataError
from mlpint.training import tasks
from mlpint.training.config import TrainConfig
from mlpint.training.data.bpe import BytePairs
from mlpint.training.data.labelled import load_labelled
from mlpint.training.metrics import read_lines
from mlpint.training.models import BERT, Shape, TextClassifier
from mlpint.training.trainer import Trainer
from refusal import fails

SMALL = {"layers": 6, "dim": 16, "heads": 2, "ffn": 24, "open_layers": 1, "close_layers": 1, "cfactor": 2}
SMALL |= {"batch": 4, "sequence": 20, "lr": 1e-2, "warmup": 2, "compare": 0, "eval_batches": 0, "threads": 1}
SMALL |= {"forward_iters": 2, "coarse": "fitted", "beta2": 0.999}  # which learns; without the consistency term


def flags(**values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | values).items()]


def losses(directory):
    return [line["loss"] for line in read_lines(directory / "metrics.jsonl") if "loss" in line]


def tensors(checkpoint):
    """All that a checkpoint holds of the model."""
    found = {}
    for file in checkpoint.glob("*.safetensors"):
        found |= {name: t for name, t in load_file(file).items() if name.startswith("model.")}
    return found


def sentence(n, text, **about):
    comments = [f"# {name} = {value}\n" for name, value in {"sent_id": f"s{n}", "text": text, **about}.items()]
    return "".join(comments) + "1\tword\t_\tNOUN" + "\t_" * 6 + "\n\n"


def treebank(sentences, types=("ask", "say", "cry")):
    """CoNLL-U in which the mark that runs through a sentence says its type; the third part is longer than 20 bytes."""
    marks = {kind: mark for kind, mark in zip(types, "?.!", strict=True)}
    kinds = [types[n * n % 7 % 3] for n in range(sentences)]
    lengths = [3 + n % 7 + 8 * (n % 3) for n in range(sentences)]
    texts = [(f"ä{n}{marks[kind]}" * 30)[:length] for n, (kind, length) in enumerate(zip(kinds, lengths, strict=True))]
    return "".join(sentence(n, t, s_type=k) for n, (t, k) in enumerate(zip(texts, kinds, strict=True)))


@pytest.fixture
def bank(tmp_path):
    (tmp_path / "bank.conllu").write_text(treebank(60))
    return {"task": "classification", "data": str(tmp_path / "bank.conllu")}


@pytest.fixture
def bert(tmp_path, capsys):
    """A BERT's run of two steps."""
    (tmp_path / "text.txt").write_text("abc! def? ghi. " * 100)
    options = {"task": "bert", "data": tmp_path / "text.txt", "steps": 2, "checkpoint_every": 2, "sample": 0}
    assert cli.main(["train", *flags(**options, out=tmp_path / "bert")]) == 0
    capsys.readouterr()
    return tmp_path / "bert"


def logits_alone(model, batch):
    """Of each text by itself, without padding: a plain mean over its states."""
    tokens, _, lengths = batch
    means = [model.encode(row[None, :n]).mean(1) for row, n in zip(tokens, lengths.tolist(), strict=True)]
    return F.linear(torch.cat(means), model.classes.weight, model.classes.bias)


def test_padding_changes_no_class():
    model = TextClassifier(classes=5, vocabulary=30, sequence=9, shape=Shape(layers=3, dim=16, heads=2)).double().eval()
    tokens, lengths = torch.randint(30, (3, 9)), torch.tensor([4, 9, 1])
    together = model(tokens, lengths)
    torch.testing.assert_close(together, logits_alone(model, (tokens, None, lengths)))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(model(tokens[row : row + 1, :length], lengths[row : row + 1])[0], together[row])
    tokens[0, 3] += 1 - 2 * (tokens[0, 3] == 29)
    assert not torch.allclose(model(tokens, lengths)[0], together[0])  # the last token counts, too


def test_a_classifier_takes_the_parameters_of_a_bert():
    sizes = {"vocabulary": 30, "sequence": 9, "shape": Shape(layers=3, dim=16, heads=2)}
    bert, classifier = BERT(**sizes), TextClassifier(5, **sizes)
    missing, unexpected = classifier.load_state_dict(bert.state_dict(), strict=False)
    assert missing == ["classes.weight", "classes.bias"]
    assert {name.partition(".")[0] for name in unexpected} == {"transform", "transform_norm", "head"}
    tokens, lengths = torch.randint(30, (3, 9)), torch.tensor([4, 9, 1])
    assert torch.equal(classifier.encode(tokens, lengths), bert.encode(tokens, lengths))


def test_exact_fine_tuning_is_plain_fine_tuning(bank, bert, tmp_path, capsys):
    values = SMALL | bank | {"steps": 6, "clip": 0, "weight_decay": 0.0}
    task = tasks.make(TrainConfig.of(values))
    torch.manual_seed(0)
    model = task.model()
    head = model.classes.weight.detach().clone()
    pretrained = {n.removeprefix("model."): t for n, t in tensors(bert / "checkpoints/step-00000002").items()}
    assert model.load_state_dict(pretrained, strict=False).missing_keys == ["classes.weight", "classes.bias"]
    assert torch.equal(model.classes.weight, head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    expected = []
    for step in range(6):
        batch = task.train(step)
        loss = F.cross_entropy(logits_alone(model, batch), batch[1])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 2 if step < 2 else 0.1 + 0.45 * (1 + np.cos(np.pi * (step - 2) / 3)))
        optimizer.step()
        expected.append(loss.item())
    with torch.no_grad():
        held_out = [task.validation(i, task.held_out_batches) for i in range(task.held_out_batches)]
        logits = torch.cat([logits_alone(model, batch) for batch in held_out])
        targets = torch.cat([batch[1] for batch in held_out])
    arguments = bank | {"steps": 6, "clip": 0, "weight_decay": 0.0, "levels": 1, "init_from": bert}
    assert cli.main(["train", *flags(**arguments, out=tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "54 texts, 6 held out, " in out and "; 3 classes, " in out
    assert f"78 tensors from {bert}/checkpoints/step-00000002; classes.weight, classes.bias start anew\n" in out
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    last = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line][-1]
    assert last["val_loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    assert last["val_accuracy"] == pytest.approx(float((logits.argmax(-1) == targets).float().mean()), abs=1e-6)
    assert last["texts"] == 24 and len(targets) == 6
    found = logits.argmax(-1)
    lines = (tmp_path / "run" / "sample.txt").read_text().splitlines()
    for line, text, ours, right in zip(lines, task.held_out, found, targets, strict=True):
        wrong = "" if ours == right else f" (not {task.classes[right]})"
        assert line == f"{task.classes[ours]}{wrong}: {text.text}"


def test_byte_pairs_of_the_pre_training_are_read(bank, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(" ".join(f"w{n % 7} abc! def?" for n in range(300)))
    once = {"steps": 1, "sample": 0}
    pretraining = once | {"task": "bert", "data": tmp_path / "text.txt", "tokenizer": "bpe", "vocabulary": 290}
    assert cli.main(["train", *flags(**pretraining, out=tmp_path / "bert")]) == 0
    saved = tmp_path / "bert" / "tokenizer.json"
    finetuning = bank | once | {"init_from": tmp_path / "bert", "tokenizer": saved}
    assert cli.main(["train", *flags(**finetuning, out=tmp_path / "run")]) == 0
    assert "classes.weight, classes.bias start anew" in capsys.readouterr().out
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == saved.read_bytes()
    task, pairs = tasks.make(TrainConfig.of(SMALL | bank | {"tokenizer": str(saved)})), BytePairs(saved.read_bytes())
    for index, tokens, length in zip(task.order(0), *(task.train(0)[i] for i in (0, 2)), strict=True):
        whole = pairs.encode([task.training[index].text])[0]
        half = SMALL["sequence"] // 2
        cut = whole if len(whole) <= 2 * half else whole[:half] + whole[-half:]
        assert tokens[:length].tolist() == cut
    assert "vocabulary is 256 tokens, that of" in fails(
        tmp_path, capsys, *flags(**bank), f"--init-from={tmp_path}/bert"
    )


def test_it_learns_and_goes_on_without_what_it_started_from(bank, bert, tmp_path):
    options = bank | {"steps": 40, "checkpoint_every": 20, "eval_every": 0, "init_from": bert, "dropout": 0.1}
    options |= {"batch": 8, "control": "gradient", "control_every": 10}
    assert cli.main(["train", *flags(**options, out=tmp_path / "run")]) == 0
    shutil.move(bert, tmp_path / "elsewhere")
    again = [f"--resume={tmp_path}/run/checkpoints/step-00000020", f"--out={tmp_path}/again"]
    assert cli.main(["train", *again]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")[20:]
    ends = [tensors(tmp_path / name / "checkpoints/step-00000040") for name in ("run", "again")]
    assert len(ends[0]) == 80 and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    last = [line for line in read_lines(tmp_path / "again" / "metrics.jsonl") if "loss" in line][-1]
    assert last["val_accuracy"] > 0.9


TWO_RANKS = """
    import sys, json, torch, mlpint
    from pathlib import Path
    from mlpint import cli
    from mlpint.training import tasks
    from mlpint.training.config import TrainConfig
    from mlpint.errors import CheckpointError
    from mlpint.training.trainer import Trainer

    place, values, pretraining, finetuning = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
    assert cli.main(["train", *pretraining]) == 0
    comm = mlpint.init()
    config = TrainConfig.of(values)

    def trainer():
        return Trainer(config, tasks.make(config), comm)

    for name in ("bert", "bert2"):  # saved by one rank and by two
        started = trainer()
        started.start_from(str(place / name))
        started.save(place / f"from-{name}")

    damaged = place / "bert2/checkpoints/step-00000002/rank-00001.safetensors"
    content = damaged.read_bytes()

    def write(content):
        comm.barrier()
        if comm.rank == 0:
            damaged.write_bytes(content)
        comm.barrier()

    write(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    untouched = trainer()
    before = {name: p.detach().clone() for name, p in untouched.model.named_parameters()}
    try:
        untouched.start_from(str(place / "bert2"))
    except CheckpointError as error:  # rank 0 reads none of that file
        assert "rank-00001.safetensors: is damaged" in str(error)
    else:
        raise AssertionError("damage was not seen")
    assert all(torch.equal(p, before[name]) for name, p in untouched.model.named_parameters())
    write(content)
    assert cli.main(["train", *finetuning, "--layers=8"]) == 2
    sys.exit(cli.main(["train", *finetuning]))
"""


def test_weights_go_from_any_number_of_ranks_to_any_other(bank, bert, tmp_path):
    pretraining = {"task": "bert", "data": str(tmp_path / "text.txt"), "steps": 2, "checkpoint_every": 2, "sample": 0}
    finetuning = bank | {"steps": 4, "init_from": str(bert), "dropout": 0.1}
    arguments = (flags(**pretraining, out=tmp_path / "bert2"), flags(**finetuning, out=tmp_path / "run"))
    result = run(TWO_RANKS, 2, args=(str(tmp_path), *map(json.dumps, (SMALL | bank, *arguments)))).check()
    assert result.stderr.count("\n") == 1 and "holds 6 layers, the model has 8; give --layers 6" in result.stderr
    assert result.stdout.count("start anew") == 1
    config = TrainConfig.of(SMALL | bank)
    torch.manual_seed(0)
    drawn = tasks.make(config).model().classes
    alone = Trainer(config, tasks.make(config), mlpint.Comm.of(None))
    for name, ranks in (("bert", 1), ("bert2", 2)):
        saved = tmp_path / name / "checkpoints/step-00000002"
        assert len(list(saved.glob("*.safetensors"))) == ranks
        expected, found = tensors(saved), tensors(tmp_path / f"from-{name}" / "step-00000000")
        alone.start_from(str(tmp_path / name))
        ours = {f"model.{n}": t for n, t in alone.model.state_dict().items()}
        expected |= {"model.classes.weight": drawn.weight, "model.classes.bias": drawn.bias}
        assert len(ours) == 80 and ours.keys() == found.keys()
        for n in ours:
            assert torch.equal(found[n], expected[n]) and torch.equal(ours[n], expected[n]), n
    assert cli.main(["train", *flags(**finetuning, out=tmp_path / "alone")]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=2e-5)


# --- texts with classes ----------------------------------------------------------------------------------------------


def test_treebanks_tables_and_data_sets(tmp_path, monkeypatch):
    (tmp_path / "bank").mkdir()
    bank = sentence(0, "Hi.", newdoc="1", **{"meta::genre": "news"}, s_type="frag") + sentence(1, "Go!", s_type="imp")
    (tmp_path / "bank" / "a.conllu").write_text(bank)
    (tmp_path / "bank" / "b.conllu.gz").write_bytes(gzip.compress(sentence(2, "ä", s_type="imp").encode()))
    training, held_out = load_labelled(str(tmp_path / "bank"))
    assert [(t.text, t.label) for t in training] == [("Hi.", "frag"), ("Go!", "imp")]
    assert [(t.text, t.label) for t in held_out] == [("ä", "imp")]
    (tmp_path / "c.conllu").write_text(bank + sentence(2, "Ah.", **{"meta::genre": "blog"}))
    found, _ = load_labelled(str(tmp_path / "c.conllu"), str(tmp_path / "c.conllu"), label="meta::genre")
    assert [t.label for t in found] == ["news", "news", "blog"]

    rows = "".join(f"{n}\t{'good' if n % 2 else 'bad'}\ttext {n}\r\n" for n in range(30))
    (tmp_path / "d.tsv.gz").write_bytes(gzip.compress(f"idx\tlabel\tsentence\r\n{rows}".encode()))
    training, held_out = load_labelled(str(tmp_path / "d.tsv.gz"))
    assert [t.text for t in held_out] == ["text 9", "text 19", "text 29"]
    assert len(training) == 27 and training[8].text == "text 8" and training[8].label == "bad"
    (tmp_path / "e.tsv").write_text("text\tkind\na\tx\n")
    (tmp_path / "f.tsv").write_text("text\tkind\na\tx\nb\ty\n")
    _, held_out = load_labelled(str(tmp_path / "f.tsv"), str(tmp_path / "e.tsv"), "kind")
    assert [(t.text, t.label, t.place) for t in held_out] == [("a", "x", "line 2")]

    class Columns(dict):
        column_names = property(list)
        features = {"sentence": types.SimpleNamespace(), "label": types.SimpleNamespace(names=["neg", "pos"])}

    splits = {"train": Columns(sentence=["a", "b"], label=[1, 0]), "validation": Columns(sentence=["c"], label=[1])}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_: splits))
    training, held_out = load_labelled("hf:glue:sst2")
    assert [(t.text, t.label) for t in (*training, *held_out)] == [("a", "pos"), ("b", "neg"), ("c", "pos")]
    splits["train"]["label"][1] = -1
    with pytest.raises(DataError, match="hf:glue:sst2: row 1 has nothing in the column label"):
        load_labelled("hf:glue:sst2")
    with pytest.raises(DataError, match="has the columns sentence, label; must have kind"):
        load_labelled("hf:glue:sst2", label="kind")


def test_long_texts_are_cut(bank, tmp_path):
    task = tasks.make(TrainConfig.of(SMALL | bank))
    everyone = [*task.training, *task.held_out]
    cut = sum(len(t.text.encode()) > 20 for t in everyone)
    assert 0 < cut < len(everyone) and f"{cut} cut to 20 bytes" in task.describe()
    for position in range(13):  # an epoch
        tokens, classes, lengths = task.train(position)
        for row, kind, length, n in zip(tokens, classes, lengths, task.order(position), strict=True):
            text, found = task.training[n].text.encode(), bytes(row[:length].tolist())
            assert found == (text if len(text) <= 20 else text[:10] + text[-10:])
            assert task.classes[kind] == task.training[n].label
        assert tokens.shape[1] == int(lengths.max())


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_texts_are_told_before_the_first_step(bank, tmp_path, capsys):
    (tmp_path / "other.conllu").write_text(treebank(9, types=("ask", "say", "sing")))
    for name, content in {
        "one.tsv": "text\tlabel\na\tx\nb\tx\n",
        "two.tsv": "text\tlabel\na\tx\nb\ty\n",
        "columns.tsv": "text\tlabel\na\tx\nb\n",
        "nothing.tsv": "text\tlabel\na\tx\n\ty\n",
        "header.tsv": "text\tlabel\n",
        "empty.tsv": "",
        "untold.conllu": sentence(0, "a", s_type="x") + sentence(1, "b"),
        "silent.conllu": sentence(0, "", s_type="x"),
        "text.txt": "a",
    }.items():
        (tmp_path / name).write_text(content)
    for arguments, words in (
        (["--data="], "data = '': must name a CoNLL-U or .tsv file"),
        (["--tokenizer=bpe"], "tokenizer = 'bpe': must be 'bytes', or the tokenizer.json of the run"),
        (
            [f"--tokenizer={tmp_path}/no.json"],
            "no.json': cannot be read (No such file or directory); must be bytes, bpe",
        ),
        (["--vocabulary=200"], "vocabulary = 200: must be at least 256"),
        ([f"--data={tmp_path}/nowhere"], "nowhere: cannot be read"),
        ([f"--data={tmp_path}/nowhere.tsv"], "nowhere.tsv: cannot be read"),
        ([f"--data={tmp_path}/text.txt"], "text.txt: must be a .conllu or .tsv file"),
        ([f"--data={tmp_path}/empty.tsv"], "empty.tsv: is empty"),
        ([f"--data={tmp_path}/header.tsv"], "header.tsv: has a header and no texts"),
        ([f"--data={tmp_path}/columns.tsv"], "columns.tsv: line 3 has 1 columns between tabs, the header 2"),
        ([f"--data={tmp_path}/nothing.tsv"], "nothing.tsv: line 3 has nothing in the column text"),
        ([f"--data={tmp_path}/one.tsv"], "one.tsv: has only the class 'x'; at least 2 are needed"),
        ([f"--data={tmp_path}/two.tsv"], "1 examples to train on are too few for batch = 4"),
        ([f"--data={tmp_path}/two.tsv", "--label=kind"], "two.tsv: has the columns text, label; must have kind"),
        ([f"--data={tmp_path}/untold.conllu"], "untold.conllu: sentence s1 has no comment '# s_type = ...'"),
        ([f"--data={tmp_path}/silent.conllu"], "silent.conllu: sentence s0 has no comment '# text = ...'"),
        (["--label=mood"], "bank.conllu: sentence s0 has no comment '# mood = ...'; it has sent_id, text, s_type"),
        ([f"--validation={tmp_path}/other.conllu"], "sentence s3 has the class 'sing', unknown in"),
    ):
        assert words in fails(tmp_path, capsys, *flags(**bank), *arguments), arguments


def test_weights_that_do_not_fit_are_told_before_the_first_step(bank, bert, tmp_path, capsys):
    once, text = {"steps": 1, "checkpoint_every": 1, "sample": 0}, {"data": tmp_path / "text.txt"}
    assert cli.main(["train", *flags(**once, **text, task="bert", vocabulary=300, out=tmp_path / "more")]) == 0
    assert cli.main(["train", *flags(**once, **text, task="gpt", out=tmp_path / "gpt")]) == 0
    assert cli.main(["train", *flags(**once, **bank, out=tmp_path / "other")]) == 0
    mlpint.checkpoint.save(tmp_path / "linear", 0, torch.nn.Linear(2, 2))
    (tmp_path / "kinds.conllu").write_text(treebank(60, types=("a", "b", "c")))
    capsys.readouterr()
    (tmp_path / "damaged").mkdir()
    file = next(shutil.copytree(bert, tmp_path / "damaged" / "run").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    start = f"--init-from={bert}"
    for arguments, words in (
        ([f"--init-from={tmp_path}/nowhere"], "nowhere: there is no such run or checkpoint directory"),
        ([f"--init-from={tmp_path}/damaged/run"], "rank-00000.safetensors: is damaged"),
        ([f"--init-from={tmp_path}/linear"], "step-00000000: holds no layer of the model (blocks.0, ...)"),
        ([start, "--layers=8"], "holds 6 layers, the model has 8; give --layers 6"),
        ([start, "--layers=4"], "holds 6 layers, the model has 4; give --layers 6"),
        ([start, "--sequence=19"], "[20, 16] in the checkpoint, [19, 16] in the model; sequence is 20 there and 19"),
        ([start, "--dim=32"], "[257, 16] in the checkpoint, [257, 32] in the model; dim is 16 there and 32 here"),
        ([f"--init-from={tmp_path}/gpt"], "tokens.weight is [256, 16] in the checkpoint, [257, 16] in the model"),
        ([start, "--heads=4"], "heads = 4: must be 2, as in"),
        ([start, "--step-size=0.5"], "step_size = 0.5, open_layers = 1, close_layers = 1: must be step_size = 1.0,"),
        ([start, "--vocabulary=300"], "vocabulary is 300 tokens, that of"),
        ([f"--init-from={tmp_path}/more"], "vocabulary is 256 tokens, that of"),
        ([f"--init-from={tmp_path}/other", f"--data={tmp_path}/kinds.conllu"], "classes is 3, digest"),
        ([f"--init-from={bert}", f"--resume={bert}"], "is for a new run, and resume ="),
    ):
        assert words in fails(tmp_path, capsys, *flags(**bank), *arguments), arguments
