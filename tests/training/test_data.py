"""Text as tokens: the same batches everywhere, held-out text never trained on, unreadable text told early."""

import gzip

import numpy as np
import pytest
import torch

from mlpint.errors import DataError
from mlpint.training.data import Batches, Corpus, load


def corpus_of(train, validation, vocabulary=1000):
    return Corpus(np.asarray(train, np.uint16), np.asarray(validation, np.uint16), vocabulary, "test")


def test_embedded_text_is_english_and_python():
    corpus = load("", sequence=64)
    assert corpus.train.dtype == np.uint8 and corpus.vocabulary == 256
    assert len(corpus.train) > 2_000_000
    assert 0.09 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.11
    text = corpus.train.tobytes()
    assert b"def __init__(self" in text and b"The" in text
    assert np.array_equal(load("", sequence=64).train, corpus.train)


def test_targets_are_the_next_tokens():
    batches = Batches(corpus_of(range(500), range(500, 600)), sequence=7, batch=4, seed=0)
    for inputs, targets in (batches.train(3), batches.validation(0, 2)):
        assert inputs.shape == targets.shape == (4, 7) and inputs.dtype == torch.int64
        assert torch.equal(inputs + 1, targets)


def test_held_out_text_is_not_trained_on():
    batches = Batches(corpus_of(range(500), range(500, 600)), sequence=7, batch=4, seed=0)
    trained = torch.cat([torch.stack(batches.train(p)) for p in range(500)])
    assert (int(trained.min()), int(trained.max())) == (0, 499)  # all of the text, to both ends
    held_out = torch.cat([torch.stack(batches.validation(i, 5)) for i in range(5)])
    assert (int(held_out.min()), int(held_out.max())) == (500, 599)


def test_batches_depend_on_seed_and_position_alone():
    corpus = load("", sequence=16)
    one, other = Batches(corpus, 16, 4, seed=7), Batches(corpus, 16, 4, seed=7)
    forwards = [one.train(p)[0] for p in range(5)]
    backwards = [other.train(p)[0] for p in reversed(range(5))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    assert not torch.equal(forwards[0], forwards[1])
    assert not torch.equal(forwards[0], Batches(corpus, 16, 4, seed=8).train(0)[0])


def test_files_and_directories(tmp_path):
    a, b = bytes(range(97, 123)) * 10, b"0123456789" * 20
    (tmp_path / "b.txt").write_bytes(b)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(a))
    (tmp_path / ".hidden").write_bytes(b"hidden" * 100)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0" * 100)

    def whole(path):
        corpus = load(str(path), sequence=4)
        return corpus.train.tobytes() + corpus.validation.tobytes()

    assert whole(tmp_path / "b.txt") == b
    assert whole(tmp_path / "sub" / "c.txt.gz") == a
    assert whole(tmp_path) == b + b"\n" + a


def test_token_files(tmp_path):
    train, val = np.arange(300, dtype="<u2"), np.arange(300, 400, dtype="<u2")
    train.tofile(tmp_path / "train.bin")
    val.tofile(tmp_path / "val.bin")
    alone = load(str(tmp_path / "train.bin"), sequence=4)
    assert isinstance(alone.train, np.memmap) and alone.vocabulary == 50257
    assert np.array_equal(np.concatenate([alone.train, alone.validation]), train)
    pair = load(str(tmp_path), sequence=4, vocabulary=400)
    assert np.array_equal(pair.train, train) and np.array_equal(pair.validation, val)
    assert pair.vocabulary == 400 and pair.decode([1, 23]) == "1 23"


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    np.arange(300, dtype="<u2").tofile(tmp_path / "a.bin")
    batches = Batches(load(str(tmp_path / "a.bin"), sequence=4, vocabulary=280), 4, 2, seed=0)
    with pytest.raises(DataError, match=r"a\.bin: token 299 is outside the vocabulary of 280"):
        batches.validation(0, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"too short", "0 tokens to train on and 9 held out are too few for sequence = 16"),
        ("just.txt", b"x" * 33, "16 tokens to train on and 17 held out are too few"),
        ("empty.txt", b"", "too few"),
        ("odd.bin", b"x" * 101, "101 bytes are not a file of uint16 tokens"),
        ("empty.bin", b"", "0 bytes are not a file of uint16 tokens"),
        ("not.gz", b"plain text" * 50, "is not a gzip file"),
        ("cut.gz", gzip.compress(bytes(range(256)) * 50)[:-20], "is not a gzip file"),
    ],
)
def test_unusable_file(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(str(tmp_path / name), sequence=16)
    assert name in str(caught.value)


def test_just_long_enough(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 34)
    corpus = load(str(tmp_path / "a.txt"), sequence=16)
    inputs, _ = Batches(corpus, 16, 2, seed=0).train(0)
    assert inputs.shape == (2, 16)


def test_directory_without_text(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0" * 100)
    with pytest.raises(DataError, match="holds no text files"):
        load(str(tmp_path), sequence=16)
