"""Parallel text: which files are taken, what is wrong with them, byte pairs, and batches of similar lengths."""

import gzip
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpint.errors import DataError
from mlpint.training.data import parallel_text
from mlpint.training.data.bpe import END, PAD, SMALLEST, SPECIAL, START, BytePairs
from mlpint.training.data.pairs import Buckets, Pairs, Ragged, held_out


def write(directory, **files):
    for name, text in files.items():
        path = directory / name.replace("__", "-").replace("_", ".")
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def load(data, **options):
    return parallel_text.load(str(data), "de", "en", **options)


GERMAN = "der Hund schläft\ndie Katze und der Hund\neine Katze\n"
ENGLISH = "the dog sleeps\nthe cat and the dog\na cat\n"


@pytest.mark.parametrize(
    "names",
    [
        ("train_de", "train_en", "val_de", "val_en", "test_de", "test_en"),
        ("train_de_gz", "train_en", "dev_de", "dev_en_gz", "test2016_de_gz", "test2016_en_gz"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "corpus__", "corpus_"])
def test_splits_are_found_by_their_names(names, prefix, tmp_path):
    write(tmp_path, **{prefix + n: GERMAN if "_de" in n else ENGLISH for n in names}, train_fr="le chien\n")
    found = load(tmp_path / "corpus" if prefix else tmp_path)
    assert set(found) == {"train", "validation", "test"}
    for sentences in found.values():
        assert sentences.source == GERMAN.splitlines() and sentences.target == ENGLISH.splitlines()
    assert Path(found["test"].names[1]).name.startswith(prefix.replace("__", "-").replace("_", ".") + "test")


def test_the_end_is_held_out_where_no_file_is(tmp_path):
    write(tmp_path, corpus_de=GERMAN * 10, corpus_en=ENGLISH * 10, other_de=GERMAN, other_en=ENGLISH)
    found = load(tmp_path / "corpus")
    assert set(found) == {"train", "validation"}
    assert len(found["train"].source) == 27 and found["validation"].source == GERMAN.splitlines()
    assert found["validation"].lines == [28, 29, 30]
    named = load(tmp_path / "corpus", validation=str(tmp_path / "other"))
    assert len(named["train"].source) == 30 and Path(named["validation"].names[0]).name == "other.de"


def test_pairs_with_an_empty_side_are_left_out(tmp_path):
    write(tmp_path, corpus_de="eins\n\ndrei\n \nfünf\n", corpus_en="one\ntwo\n\n \nfive\n")
    found = load(tmp_path / "corpus")
    assert found["train"].left_out == 3
    kept = found["train"].source + found["validation"].source, found["train"].target + found["validation"].target
    assert kept == (["eins", "fünf"], ["one", "five"])
    assert found["train"].lines + found["validation"].lines == [1, 5]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"corpus: no parallel text; looked for .*corpus-train.de and .*corpus.de .* the same in 'en'"),
        ({"corpus_de": GERMAN}, r"corpus.de: there is no such file that ends in .en, its translation"),
        ({"corpus_de": GERMAN, "corpus_en": ENGLISH + "one more\n"}, r"corpus.de: has 3 lines, .*corpus.en has 4"),
        ({"corpus_de": "", "corpus_en": ENGLISH}, r"corpus.de: is empty"),
        ({"corpus_de": GERMAN, "corpus_en": GERMAN}, r"corpus.de: holds the same text as .*corpus.en"),
        ({"corpus_de": "eins\n\n", "corpus_en": "\ntwo\n"}, r"corpus.de: no line of it .* text on both sides"),
        ({"corpus_de": "eins\n", "corpus_en": "one\n"}, r"corpus.de: one pair of sentences is too little"),
        (
            {"corpus_train_de": GERMAN, "corpus_train_en": ENGLISH, "corpus_val_de": ENGLISH, "corpus_val_en": GERMAN},
            r"corpus.val.de: is in the language of .*corpus.train.en, by its words, .*; the files have been mixed up",
        ),
        (
            {
                "corpus_train_de": GERMAN,
                "corpus_train_en": ENGLISH,
                "corpus_test_de": GERMAN,
                "corpus_test_en": "der Hund und die Katze\n" * 3,
            },
            r"corpus.test.en: is in the language of .*corpus.train.de",
        ),
        ({"corpus_train_de": GERMAN, "corpus_train_en": ENGLISH, "corpus_val_en": ENGLISH}, r"val.en: there is no"),
    ],
)
def test_files_that_do_not_fit_are_refused(files, message, tmp_path):
    write(tmp_path, **files)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "corpus")


def test_text_that_is_no_utf8_is_refused(tmp_path):
    write(tmp_path, corpus_en=ENGLISH)
    (tmp_path / "corpus.de").write_bytes(GERMAN.encode("latin-1"))
    with pytest.raises(DataError, match=r"corpus.de: is not UTF-8"):
        load(tmp_path / "corpus")


class Columns:
    """As much of a ``datasets.Dataset`` as is used."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def __getitem__(self, name):
        return self.columns[name]


def test_data_sets(monkeypatch):
    pairs = list(zip(GERMAN.splitlines(), ENGLISH.splitlines(), strict=True))
    both = Columns(translation=[{"de": de, "en": en, "fr": ""} for de, en in pairs])
    apart = Columns(de=[de for de, _ in pairs], en=[en for _, en in pairs])
    found = {"both": {"train": both, "validation": apart}, "apart": {"train": apart}}
    found["other"] = {"train": Columns(translation=[{"fr": "un", "en": "one"}])}
    found["swapped"] = {"train": apart, "test": Columns(de=ENGLISH.splitlines(), en=GERMAN.splitlines())}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, _: found[name]))
    texts = load("hf:both"), load("hf:apart", validation="hf:both")
    for text in texts:
        assert set(text) == {"train", "validation"}
        assert all(list(zip(s.source, s.target, strict=True)) == pairs for s in text.values())
    assert len(load("hf:apart")["train"].source) == 2  # one is held out
    with pytest.raises(DataError, match="hf:other: has translations between fr, en; must have de and en"):
        load("hf:other")
    with pytest.raises(DataError, match="hf:apart: has the columns de, en; must have fr"):
        parallel_text.load("hf:apart", "fr", "en")
    with pytest.raises(DataError, match=r"hf:swapped, validation.de: is in the language of hf:swapped, train.en"):
        load("hf:swapped")


# --- byte pairs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt():
    return BytePairs.learn([*GERMAN.splitlines(), *ENGLISH.splitlines()] * 3, SMALLEST + 40)


@given(line=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_comes_back(learnt, line):
    (tokens,) = learnt.encode([line])
    assert tokens[-1] == END and all(SPECIAL <= t < learnt.vocabulary for t in tokens[:-1])
    assert learnt.decode(tokens) == line.strip()


def test_common_pairs_are_one_token(learnt):
    assert SMALLEST < learnt.vocabulary <= SMALLEST + 40
    first, second = learnt.encode(["der Hund", "xq zj"])
    assert len(first) == 3 and len(second) > 5
    (special,) = learnt.encode(["<pad></s>"])
    assert len(special) > 5 and learnt.decode([START, *special, PAD]) == "<pad></s>"  # text that looks like no text
    again = BytePairs(learnt.saved)
    assert again.encode(["die Katze"]) == learnt.encode(["die Katze"]) and again.vocabulary == learnt.vocabulary


# --- batches ---------------------------------------------------------------------------------------------------------


def random_pairs(count=500):
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        sequences = [[*rng.integers(SPECIAL, 99, rng.integers(0, 30)).tolist(), END] for _ in range(count)]
        sides.append(sequences)
    return Pairs(*(Ragged.of(side) for side in sides)), sides


def test_a_batch_holds_its_sequences():
    pairs, (source, target) = random_pairs()
    which = np.array([3, 77, 12])
    tokens, lengths, given, wanted = pairs.batch(which)
    for row, n in enumerate(which):
        assert tokens[row, : lengths[row]].tolist() == source[n] and (tokens[row, lengths[row] :] == PAD).all()
        count = len(target[n])
        assert wanted[row, :count].tolist() == target[n] and (wanted[row, count:] == PAD).all()
        assert given[row, :count].tolist() == [START, *target[n][:-1]]
    assert tokens.shape[1] == max(len(source[n]) for n in which) and given.shape == wanted.shape
    assert all(t.dtype == torch.int64 for t in (tokens, lengths, given, wanted))


@pytest.mark.parametrize("shards", [1, 3])
def test_every_pair_once_an_epoch(shards):
    pairs, _ = random_pairs()
    dealt = [Buckets(pairs, 7, seed=5, shard=s, shards=shards) for s in range(shards)]
    per_epoch = 500 // (7 * shards)
    assert all(b.per_epoch == per_epoch for b in dealt)
    epochs = []
    for epoch in range(2):
        taken = [b(epoch * per_epoch + p) for p in range(per_epoch) for b in dealt]
        assert len(set(np.concatenate(taken))) == len(taken) * 7
        epochs.append(taken)
    assert not all(np.array_equal(a, b) for a, b in zip(*epochs, strict=True))


def test_batches_depend_on_seed_and_position_alone():
    pairs, _ = random_pairs()
    forwards = [Buckets(pairs, 7, seed=5)(p) for p in range(160)]
    other = Buckets(pairs, 7, seed=5)
    assert all(np.array_equal(other(p), forwards[p]) for p in (150, 3, 80, 0))
    assert not np.array_equal(Buckets(pairs, 7, seed=6)(0), forwards[0])


def test_lengths_in_a_batch_are_alike_and_batches_are_not_in_order():
    pairs, _ = random_pairs(2000)
    buckets = Buckets(pairs, 10, seed=0)
    lengths = [pairs.target.lengths[buckets(p)] for p in range(buckets.per_epoch)]
    assert np.mean([row.max() - row.min() for row in lengths]) < 2  # at random it would be 25
    means = [row.mean() for row in lengths]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_held_out_pairs_are_all_taken_once():
    pairs, _ = random_pairs(95)
    whole = np.concatenate([held_out(pairs, 10, i, 10) for i in range(10)])
    assert sorted(whole) == list(range(95))
    some = np.concatenate([held_out(pairs, 10, i, 3) for i in range(3)])
    assert len(set(some)) == 30
    assert abs(pairs.target.lengths[some].mean() - pairs.target.lengths.mean()) < 1


def test_too_few_pairs():
    pairs, _ = random_pairs(20)
    with pytest.raises(DataError, match=r"20 pairs to train on are too few for batch = 8 on 3 data shards"):
        Buckets(pairs, 8, seed=0, shards=3)
