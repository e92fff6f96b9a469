"""Data of tasks: orders without overlap, treebanks, images, and the cache that is whole or made again."""

import gzip
import sys
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpint.errors import DataError
from mlpint.training.data import Batches, Corpus, load
from mlpint.training.data.cache import cached
from mlpint.training.data.conllu import UPOS, read_conllu
from mlpint.training.data.images import load_images
from mlpint.training.data.order import Order, spread
from mlpint.training.data.words import FEATURES, WordFeatures, features

# --- order -----------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 60), batch=st.integers(1, 7), shards=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_an_epoch_has_each_example_once_and_no_two_shards_share_one(count, batch, shards, seed):
    if count < batch * shards:
        with pytest.raises(DataError, match=f"{count} examples to train on are too few for batch = {batch}"):
            Order(count, batch, seed, 0, shards)
        return
    orders = [Order(count, batch, seed, shard, shards) for shard in range(shards)]
    steps = count // (batch * shards)
    for epoch in (0, 3):
        taken = [i for order in orders for p in range(steps) for i in order(epoch * steps + p)]
        assert len(taken) == len(set(taken)) == steps * batch * shards
        assert set(taken) <= set(range(count))
        assert count - len(taken) < batch * shards  # no more is dropped than fills no batch


def test_the_order_depends_on_seed_and_position_alone():
    forwards, backwards = Order(50, 8, seed=3), Order(50, 8, seed=3)
    expected = [forwards(p) for p in range(20)]
    for p in reversed(range(20)):
        assert np.array_equal(backwards(p), expected[p])
    epochs = [np.concatenate(expected[6 * e : 6 * e + 6]) for e in range(3)]
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(Order(50, 8, seed=4)(0), expected[0])


@given(count=st.integers(1, 100), batch=st.integers(1, 9), batches=st.integers(1, 20))
def test_spread(count, batch, batches):
    taken = [i for b in range(batches) for i in spread(count, batch, b, batches)]
    assert taken == sorted(set(taken)) and len(taken) == min(count, batch * batches)
    assert taken[0] == 0 and taken[-1] + -(-count // len(taken)) >= count  # from one end to the other


def test_shards_of_a_text_do_not_overlap():
    corpus = Corpus(np.arange(1000, dtype=np.uint16), np.arange(1000, 1100, dtype=np.uint16), 2000, "test")
    seen = []
    for shard in range(3):
        batches = Batches(corpus, sequence=7, batch=16, seed=0, shard=shard, shards=3)
        seen.append({t for p in range(60) for pair in batches.train(p) for t in pair.flatten().tolist()})
    assert set.union(*seen) == set(range(1000)) and sum(map(len, seen)) == 1000
    with pytest.raises(DataError, match="too few for 200 data shards"):
        Batches(corpus, sequence=7, batch=1, seed=0, shard=0, shards=200)


def test_text_to_validate_on(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 90)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"b" * 30))
    corpus = load(str(tmp_path / "a.txt"), sequence=16, validation=str(tmp_path / "b.txt.gz"))
    assert corpus.train.tobytes() == b"a" * 90 and corpus.validation.tobytes() == b"b" * 30
    np.arange(50, dtype="<u2").tofile(tmp_path / "c.bin")
    with pytest.raises(DataError, match="holds text and .*c.bin tokens"):
        load(str(tmp_path / "a.txt"), sequence=16, validation=str(tmp_path / "c.bin"))


# --- treebanks -------------------------------------------------------------------------------------------------------

TREEBANK = """\
# newdoc id = d1
# meta::genre = news
# sent_id = d1-1
1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tdo\tdo\tAUX\tVBP\t_\t0\troot\t_\t_
2\tn't\tnot\tPART\tRB\t_\t1\tadvmod\t_\t_
2.1\tghost\t_\tVERB\t_\t_\t_\t_\t_\t_

# sent_id = d1-2
1\tNew York\tNew York\tPROPN\tNNP\t_\t0\troot\t_\t_
"""


def test_treebanks(tmp_path):
    (tmp_path / "a.conllu").write_text(TREEBANK)
    (tmp_path / "b.conllu.gz").write_bytes(gzip.compress(TREEBANK.replace("\n", "\r\n").encode()))
    (tmp_path / "notes.txt").write_text("not a treebank")
    one, two = read_conllu(tmp_path / "a.conllu")
    assert one.words == ["do", "n't"] and [UPOS[t] for t in one.tags] == ["AUX", "PART"]
    assert two.words == ["New York"] and [UPOS[t] for t in two.tags] == ["PROPN"]
    assert one.about["sent_id"] == "d1-1" and two.about["sent_id"] == "d1-2"
    assert one.about["meta::genre"] == two.about["meta::genre"] == "news"
    assert [s.words for s in read_conllu(tmp_path)] == [one.words, two.words] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "holds no sentences"),
        (TREEBANK.replace("\tPROPN", "\t_").encode(), "line 10 has the tag '_'"),
        (TREEBANK.replace("\tAUX", "").encode(), "line 5 has 9 columns between tabs; CoNLL-U has 10"),
        (b"a plain text\n", "line 1 has 1 columns"),
        (b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_unusable_treebank(content, message, tmp_path):
    (tmp_path / "bad.conllu").write_bytes(content)
    with pytest.raises(DataError, match=f"bad.conllu: {message}"):
        read_conllu(tmp_path / "bad.conllu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .conllu files"):
        read_conllu(tmp_path / "empty")


def test_words_are_known_by_their_parts():
    assert all(len(features(word)) == FEATURES for word in ("a", "Running", "1990s", "é", "-"))
    known = WordFeatures(["walked", "walked", "talked", "ZOO"], least=2)
    walked, balked, zoo = known(["walked", "balked", "ZOO"])
    assert (walked > 0).all() and balked[0] == 0  # a word never seen ...
    assert set(walked) & set(balked) - {0} == {known.numbers[f"end {e}"] for e in ("d", "ed", "ked", "lked")} | {
        known.numbers["shape x"]
    }  # ... but its shape and its endings
    assert (zoo == 0).all()  # seen once: counts as unknown, features and all
    assert known.digest() == WordFeatures(["ZOO", "walked", "talked", "walked"]).digest()
    assert known.digest() != WordFeatures(["walked", "walked", "talked", "talked"]).digest()


# --- images ----------------------------------------------------------------------------------------------------------


def write_image(path, value, size=(4, 6), mode="L"):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if mode == "L" else (*size, 3)
    Image.fromarray(np.full(shape, value, np.uint8), mode).save(path)


def test_image_folders(tmp_path):
    for n in range(10):
        write_image(tmp_path / "cat" / f"{n:02}.png", n)
        write_image(tmp_path / "dog" / "sub" / f"{n:02}.png", 100 + n)
    found = load_images(str(tmp_path))
    assert found.train.classes == ["cat", "dog"] and found.train.size == (4, 6, 1)
    assert (len(found.train), len(found.held_out)) == (16, 4)
    parts = [
        (images.take(np.arange(len(images)))[:, 0, 0, 0] * 255).round().tolist()
        for images in (found.train, found.held_out)
    ]
    assert parts[1] == [4, 9, 104, 109] and sorted(parts[0] + parts[1]) == [*range(10), *range(100, 110)]
    assert found.held_out.labels.tolist() == [0, 0, 1, 1]

    write_image(tmp_path / "dog" / "big.png", 7, size=(8, 6))
    with pytest.raises(DataError, match=r"big.png: is 8 x 6 x 1, .*00.png is 4 x 6 x 1; must be of one size, or give"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), size=4).train.take(np.arange(3)).shape == (3, 1, 4, 4)
    (tmp_path / "dog" / "big.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="big.png: is not an image"):
        load_images(str(tmp_path))
    (tmp_path / "bird").mkdir()
    with pytest.raises(DataError, match="bird: holds no images"):
        load_images(str(tmp_path))


def test_image_folders_for_training_and_validation(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            write_image(tmp_path / part / name / "0.png", 50, mode="RGB")
    found = load_images(str(tmp_path))
    assert found.train.take(np.array([1])).shape == (1, 3, 4, 6) and found.held_out.labels.tolist() == [0, 1]
    write_image(tmp_path / "val" / "bird" / "0.png", 50, mode="RGB")
    with pytest.raises(DataError, match="class 'bird' is unknown; those to train on are cat, dog"):
        load_images(str(tmp_path))
    with pytest.raises(DataError, match="holds no folders of images"):
        load_images(str(tmp_path / "val" / "dog"))


def test_npz(tmp_path):
    images, labels = np.arange(20 * 6, dtype=np.uint8).reshape(20, 2, 3), np.arange(20) % 2
    test = {"x_test": images[:4], "y_test": labels[:4]}
    np.savez_compressed(tmp_path / "a.npz", x_train=images, y_train=labels[:, None], **test)
    found = load_images(str(tmp_path / "a.npz"))
    assert (len(found.train), len(found.held_out)) == (20, 4)
    assert np.allclose(found.train.take(np.array([3]))[0, 0] * 255, images[3])
    for name, arrays, message in (
        ("names", {"a": images}, "holds a; must hold images and labels"),
        ("few", {"images": images, "labels": labels[:3]}, "20 images with 3 labels"),
        ("flat", {"images": images.reshape(20, 6), "labels": labels}, r"images is \(20, 6\) uint8"),
        ("float", {"images": images, "labels": labels * 0.5}, "20 images with 20 labels, float64; must be"),
        ("negative", {"images": images, "labels": labels - 1}, "label -1 is negative"),
        ("alone", {"images": images[:3], "labels": labels[:3]}, "3 images are too few to hold out"),
        ("pickled", {"images": images, "labels": np.array([{}], object)}, "is not an .npz file of arrays"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(DataError, match=f"{name}.npz: {message}"):
            load_images(str(tmp_path / f"{name}.npz"))
    with pytest.raises(DataError, match="nowhere.npz: cannot be read"):
        load_images(str(tmp_path / "nowhere.npz"))


def test_digits():
    found = load_images("")
    assert (len(found.train), len(found.held_out)) == (1797 - 355, 355) and found.train.size == (8, 8, 1)
    pixels = found.train.take(np.arange(100))
    assert pixels.min() == 0 and pixels.max() == 1


# --- cache -----------------------------------------------------------------------------------------------------------


def test_the_cache_makes_arrays_once(tmp_path):
    source, made = tmp_path / "text", []
    source.write_text("one")

    def build():
        made.append(source.read_text())
        return {"tokens": np.arange(len(made[-1]) * 1000), "ends": np.ones(3)}

    def arrays(**settings):
        return cached([source], settings, build, tmp_path / "cache")

    first = arrays(size=1)
    assert isinstance(first["tokens"], np.memmap) and not first["tokens"].flags.writeable
    assert first["tokens"][-1] == 2999
    assert arrays(size=1).keys() == {"tokens", "ends"} and made == ["one"]
    arrays(size=2)
    source.write_text("four")
    assert arrays(size=1)["tokens"][-1] == 3999 and made == ["one", "one", "four"]

    entry = next(p for p in (tmp_path / "cache").glob("*/tokens.npy") if np.load(p, mmap_mode="r")[-1] == 3999)
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)
    assert arrays(size=1)["tokens"][-1] == 3999 and len(made) == 4  # a flipped bit is found and mended
    entry.with_name("manifest.json").unlink()
    assert arrays(size=1)["tokens"][-1] == 3999 and len(made) == 5
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        cached([tmp_path / "nowhere"], {}, build, tmp_path / "cache")
    with pytest.raises(DataError, match="set MLPINT_CACHE to a directory that can be written"):
        cached([source], {}, build, source)


def test_of_several_at_once_one_builds(tmp_path):
    made, found = [], []

    def build():
        made.append(1)
        time.sleep(0.05)
        return {"a": np.arange(10)}

    threads = [
        threading.Thread(target=lambda: found.append(cached([], {}, build, tmp_path)["a"].sum())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and found == [45] * 4


# --- byte pairs ------------------------------------------------------------------------------------------------------


def test_byte_pairs_of_a_text_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPINT_CACHE", str(tmp_path / "cache"))
    text = "the cat sat on the mat\nthe dog sat on the log\n" * 40
    (tmp_path / "text.txt").write_text(text)
    corpus = load(str(tmp_path / "text.txt"), sequence=8, vocabulary=300, tokenizer="bpe")
    assert isinstance(corpus.train, np.memmap) and corpus.train.dtype == np.uint16
    assert 259 < corpus.vocabulary <= 300 and corpus.train.max() < corpus.vocabulary
    assert len(corpus.train) < len(text) / 2 and not corpus.is_text
    tokens = [*corpus.train.tolist(), *corpus.validation.tolist()]
    words = corpus.decode(tokens).split()
    assert [w for w in words if w in text][: len(text.split()) // 2] == text.split()[: len(text.split()) // 2]

    def never(*_):
        raise AssertionError("learnt again")

    monkeypatch.setattr("mlpint.training.data.subwords.BytePairs.learn", never)
    again = load(str(tmp_path / "text.txt"), sequence=8, vocabulary=300, tokenizer="bpe")
    assert np.array_equal(again.train, corpus.train) and again.identity == corpus.identity
    with pytest.raises(AssertionError, match="learnt again"):
        load(str(tmp_path / "text.txt"), sequence=8, vocabulary=290, tokenizer="bpe")
    with pytest.raises(ValueError, match="vocabulary = 100: must be at least 259"):
        load(str(tmp_path / "text.txt"), sequence=8, vocabulary=100, tokenizer="bpe")
    # The pairs as a run saves them, for another text; each of its lines ends with a token that stands for no text.
    (tmp_path / "tokenizer.json").write_bytes(corpus.subwords.pairs.saved)
    (tmp_path / "other.txt").write_text("the log sat on a cat\n" * 20)
    other = load(str(tmp_path / "other.txt"), sequence=8, tokenizer=str(tmp_path / "tokenizer.json"))
    assert other.identity == corpus.identity and "the log sat on a cat" in other.decode(other.train.tolist())
    with pytest.raises(ValueError, match=f"vocabulary = 290: must be {corpus.vocabulary}, as in"):
        load(str(tmp_path / "text.txt"), sequence=8, vocabulary=290, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="bep'.*: cannot be read .*must be bytes, bpe or a file"):
        load(str(tmp_path / "text.txt"), sequence=8, tokenizer=str(tmp_path / "bep"))
    with pytest.raises(DataError, match="text.txt'.*: is no tokenizer.json"):
        load(str(tmp_path / "text.txt"), sequence=8, tokenizer=str(tmp_path / "text.txt"))
    np.arange(50, dtype="<u2").tofile(tmp_path / "c.bin")
    with pytest.raises(DataError, match="c.bin holds tokens already"):
        load(str(tmp_path / "c.bin"), sequence=8, tokenizer="bpe")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load(str(tmp_path / "text.txt"), sequence=8, tokenizer="bpe")


# --- data sets of the datasets library, which need not be there ------------------------------------------------------


class Columns:
    """As much of a ``datasets.Dataset`` as is used."""

    def __init__(self, names=None, **columns):
        self.columns, self.column_names = columns, list(columns)
        plain = types.SimpleNamespace()
        self.features = {n: types.SimpleNamespace(feature=types.SimpleNamespace(names=names)) for n in columns}
        if names is None:
            self.features = dict.fromkeys(columns, plain)

    def __getitem__(self, name):
        return self.columns[name]


@pytest.fixture
def hub(monkeypatch):
    """Makes ``datasets.load_dataset`` return the given splits, by name."""
    found = {}

    def load_dataset(path, configuration=None):
        name = f"{path}:{configuration}" if configuration else path
        if name not in found:
            raise FileNotFoundError(f"no data set\n{name}")
        return found[name]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return found


def test_data_sets(hub):
    from PIL import Image

    hub["wiki:raw"] = {"train": Columns(text=["one two three"] * 4), "validation": Columns(text=["four five six"])}
    corpus = load("hf:wiki:raw", sequence=4)
    assert corpus.train.tobytes() == b"\n".join([b"one two three"] * 4)
    assert corpus.validation.tobytes() == b"four five six"

    hub["gum"] = {"train": Columns(["NOUN", "_", "VERB"], tokens=[["cats", "x", "purr"], ["x"]], upos=[[0, 1, 2], [1]])}
    (sentence,) = read_conllu("hf:gum")
    assert sentence.words == ["cats", "purr"] and [UPOS[t] for t in sentence.tags] == ["NOUN", "VERB"]
    hub["bad"] = {"train": Columns(tokens=[["a"]], upos=[["N"]])}
    with pytest.raises(DataError, match="hf:bad: row 0 has the tag 'N'"):
        read_conllu("hf:bad")

    pictures = [Image.fromarray(np.full((4, 6), n, np.uint8)) for n in range(10)]
    hub["pictures"] = {"train": Columns(image=pictures, label=[n % 2 for n in range(10)])}
    found = load_images("hf:pictures")
    assert (len(found.train), len(found.held_out)) == (8, 2) and found.train.size == (4, 6, 1)
    hub["pictures"] = {"train": Columns(img=[*pictures, pictures[0].resize((5, 5))], label=[0] * 11)}
    with pytest.raises(DataError, match="image 10 is 5 x 5 x 1, image 0 4 x 6 x 1"):
        load_images("hf:pictures")
    assert load_images("hf:pictures", size=4).train.size == (4, 4, 1)

    with pytest.raises(DataError, match="hf:nowhere: cannot be loaded .no data set nowhere"):
        load("hf:nowhere", sequence=4)
    hub["tests"] = {"test": Columns(text=["a"])}
    with pytest.raises(DataError, match="has the splits test; must have train"):
        load("hf:tests", sequence=4)
    with pytest.raises(DataError, match="has the columns tokens, upos; must have text"):
        load("hf:gum", sequence=4)


def test_without_the_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="hf:wiki: needs the datasets library; pip install datasets"):
        load("hf:wiki", sequence=4)
