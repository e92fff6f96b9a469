"""Input that is damaged, or made to do damage: one error that says what is wrong, little memory, nothing written."""

import gzip
import io
import resource
import struct
import sys
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest

from mlpint.cli import main
from mlpint.errors import ConfigError, DataError
from mlpint.training import tasks
from mlpint.training.config import TrainConfig, read_toml
from mlpint.training.data.conllu import read_conllu
from mlpint.training.data.corpus import load
from mlpint.training.data.images import load_images
from mlpint.training.data.labelled import load_labelled
from mlpint.training.data.parallel_text import load as load_pairs

MIB = 1 << 20


def png(width, height, rows=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npz_that_claims(shape, dtype="|u1"):
    """``images`` with a header of a shape that its data do not have."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": dtype, "fortran_order": False, "shape": shape})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", head.getvalue() + b"\0" * 64)
        archive.writestr("labels.npy", npy(np.zeros(1, int)))
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zeros(size):
    return b"".join(gzip.compress(b"\0" * MIB) for _ in range(size // MIB))


GOOD = png(4, 4, b"\0\1\2\3\4" * 4)
ONE = np.zeros((6, 4, 4), np.uint8)
WORD = "1\tdo\tdo\tAUX\tVBP\t_\t0\troot\t_\t_\n"
LONG = b"x" * (10 * MIB)

IMAGES = {
    "truncated": ({"a/1.png": GOOD, "a/2.png": GOOD[:-30]}, "2.png: is damaged"),
    "truncated in its head": ({"a/1.png": GOOD[:20]}, "1.png: is not an image"),
    "200 million pixels": ({"a/1.png": png(20000, 10000)}, "1.png: .*(pixels|bomb)"),
    "70 million pixels": ({"a/1.png": png(10000, 7000)}, "has 10000 x 7000 pixels; must be 64,000,000 at most"),
    "2^31 pixels wide": ({"a/1.png": png(2**31 - 1, 2**31 - 1)}, "1.png: is not an image"),
    "no pixels": ({"a/1.png": png(0, 4)}, "1.png: is not an image"),
    "other sizes": ({"a/1.png": GOOD, "a/2.png": png(4, 5)}, "2.png: is 5 x 4 x 1, .*1.png is 4 x 4 x 1"),
    "text": ({"a/1.png": b"some text\n"}, "1.png: is not an image"),
    "an empty file": ({"a/1.png": b""}, "1.png: is not an image"),
    "control characters": ({"a\x1b[2J/1.png": GOOD}, r"the class 'a\\x1b\[2J' is named by other than printable"),
    "a newline": ({"a\nb/1.png": GOOD}, r"the class 'a\\nb' is named"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(case, tmp_path):
    files, message = IMAGES[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message), warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_images(str(tmp_path)) if "damaged" not in message else load_images(str(tmp_path), str(tmp_path))
        images.train.take(np.arange(len(images.train)))


ARRAYS = {
    "objects": (npz(images=np.array([{}, 1], object), labels=np.zeros(2, int)), "it holds Python objects"),
    "a header of 2^31": (npz_that_claims((2**31, 2**31)), r"an array \(2147483648, 2147483648\) of uint8 in"),
    "a header past 64 bits": (npz_that_claims((2**62, 2**62)), "is not an .npz file of arrays"),
    "a negative header": (npz_that_claims((-1, 4, 4)), "is not an .npz file of arrays"),
    "a bomb": (npz(images=np.zeros((200 * MIB, 1, 1), np.uint8), labels=np.zeros(1, int)), "hold more than 134,217,72"),
    "truncated": (npz(images=ONE, labels=np.zeros(6, int))[:-40], "is not an .npz file of arrays"),
    "not a zip": (npy(ONE), "is not an .npz file of arrays"),
    "NaN": (npz(images=np.full((6, 4, 4), np.nan), labels=np.zeros(6, int)), "holds values that are not finite"),
    "no pixels": (npz(images=np.zeros((6, 0, 4)), labels=np.zeros(6, int)), "holds no pixels"),
    "huge labels": (npz(images=ONE, labels=np.full(6, 2**60)), "label 1152921504606846976: must be below 1,048,576"),
    "strings": (npz(images=np.array(["a"]), labels=np.zeros(1, int)), "must be .n, height, width"),
    "other arrays": (npz(pictures=ONE), "holds pictures; must hold images and labels"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays(case, tmp_path):
    content, message = ARRAYS[case]
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.npz: .*{message}"), memory_at_most(200 * MIB):
        load_images(str(tmp_path / "a.npz"))


TEXTS = {
    "three columns": (read_conllu, "a.conllu", b"1\tdo\tAUX\n", "line 1 has 3 columns between tabs; CoNLL-U has 10"),
    "CR in a treebank": (read_conllu, "a.conllu", WORD.replace("\n", "\r").encode() * 2, "lines end in CR alone"),
    "CR in a table": (load_labelled, "a.tsv", b"text\tlabel\ra\tb\r", "lines end in CR alone"),
    "UTF-16": (read_conllu, "a.conllu", WORD.encode("utf-16"), "is not UTF-8"),
    "UTF-16 without BOM": (read_conllu, "a.conllu", WORD.encode("utf-16-le"), "holds NUL characters, as UTF-16 does"),
    "UTF-16 as text": (load, "a.txt", ("text " * 100).encode("utf-16"), "is UTF-16; must be UTF-8"),
    "a tag of 10 MB": (read_conllu, "a.conllu", WORD.encode().replace(b"AUX", LONG), "line 1 has the tag 'xxx"),
    "a table of one line of 10 MB": (load_labelled, "a.tsv", LONG, "must have text or sentence"),
    "a class with control characters": (
        load_labelled,
        "a.tsv",
        b"text\tlabel\na\t\x1b[2J\n",
        r"line 2 has the class '\\x1b\[2J'; must be printable",
    ),
    "a gzip bomb": (load, "a.txt.gz", zeros(200 * MIB), "hold more than 134,217,728, which no text does"),
    "a bomb of a treebank": (read_conllu, "a.conllu.gz", zeros(200 * MIB), "hold more than 134,217,728"),
    "truncated gzip": (load, "a.txt.gz", gzip.compress(LONG)[:-9], "is not a gzip file"),
    "no gzip": (load, "a.txt.gz", b"plain", "is not a gzip file"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case, tmp_path):
    reader, name, content, message = TEXTS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*{message}") as raised, memory_at_most(len(content) + 300 * MIB):
        reader(str(tmp_path / name), *([16] if reader is load else []))
    assert len(str(raised.value)) < 2100 and str(raised.value).isprintable()


def test_odd_texts_that_are_right(tmp_path):
    (tmp_path / "a.conllu").write_bytes(b"\xef\xbb\xbf" + WORD.replace("\n", "\r\n").encode())
    assert read_conllu(tmp_path / "a.conllu")[0].words == ["do"]
    (tmp_path / "b.conllu").write_bytes(WORD.encode().replace(b"\tdo\t", b"\t" + LONG + b"\t", 1))
    assert len(read_conllu(tmp_path / "b.conllu")[0].words[0]) == len(LONG)
    (tmp_path / "train.de").write_bytes(LONG + b"\nb\n")
    (tmp_path / "train.en").write_bytes(b"c\nd\n")
    assert load_pairs(str(tmp_path), "de", "en")["train"].target == ["c"]
    with pytest.raises(DataError, match="is a device, not a file"):
        load("/dev/zero", 16)


TOML = {
    "a wrong type": ("[run]\nsteps = '3'", "steps = '3': must be an integer"),
    "a boolean": ("[run]\nsteps = true", "steps = True: must be an integer"),
    "a list": ("[run]\nsteps = [3]", r"steps = \[3\]: must be an integer"),
    "a date": ("[data]\ndata = 2020-01-01", "data = .*: must be a string"),
    "NaN": ("[optimizer]\nlr = nan", "lr = nan: must be a number above 0"),
    "inf": ("[optimizer]\nlr = inf", "lr = inf: must be a number above 0"),
    "a negative number": ("[run]\nsteps = -1", "steps = -1: must be an integer at least 1"),
    "2^31": ("[run]\nsteps = 2147483648", "steps = 2147483648: must be an integer at least 1"),
    "a huge integer": (f"[run]\nsteps = 1{'0' * 400}", "steps = 10000"),
    "a huge integer for a float": (f"[optimizer]\nlr = 1{'0' * 400}", "lr = 10000"),
    "more digits than Python reads": (f"[run]\nsteps = 1{'0' * 5000}", "is not TOML"),
    "an unknown key": ("[run]\nstep = 3", "unknown key 'step' in .run.; did you mean 'steps'?"),
    "an unknown section": ("[runs]\nsteps = 3", "unknown section or key 'runs'"),
    "an unknown key of 100 kB": (f"[run]\n{'x' * 100_000} = 3", "unknown key 'xxx"),
    "a key twice": ("[run]\nsteps = 3\nsteps = 4", "is not TOML"),
    "deep nesting": (f"[run]\nsteps = {'[' * 100_000}", "is not TOML"),
    "NUL": ('[data]\ndata = "a\\u0000b"', "data = .*: must be a string"),
    "a name no file can have": (f"[data]\ndata = '{'a' * 300}'", "data = .*: must be a string"),
    "2 MB": ("#" * 2 * MIB, "is longer than 1,048,576 bytes"),
    "CR line ends": ("[run]\rsteps = 3\r", "is not TOML"),
    "UTF-16": ("[run]\nsteps = 3".encode("utf-16"), "is not TOML"),
    "many levels": ("[solver]\nlevels = 2000000000", "levels = 2000000000: must be an integer at most 64"),
}


@pytest.mark.parametrize("case", TOML)
def test_configurations(case, tmp_path):
    content, message = TOML[case]
    (tmp_path / "a.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as raised:
        TrainConfig.of(read_toml(tmp_path / "a.toml"))
    assert len(str(raised.value)) < 2100


@pytest.mark.parametrize(
    "values",
    [
        {"task": "vit", "image_size": 1_000_000},
        {"task": "vit", "augment": 1_000_000},
        {"dim": 1 << 20},
        {"layers": 1 << 30},
        {"ffn": 1 << 30, "layers": 1000},
        {"sequence": 1 << 30, "dim": 1024},
        {"batch": 1 << 30},
        {"vocabulary": 1 << 30, "dim": 1024},
    ],
    ids=str,
)
def test_what_no_memory_can_hold_is_refused(values):
    with memory_at_most(MIB), pytest.raises(ConfigError, match=f"{list(values)[-1]} = .* GiB, and there are"):
        tasks.make(TrainConfig.of(values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "vit", "--image-size", "1000000"], "image_size = 1000000"),
        (["--task", "vit", "--data", "bomb"], "hold more than"),
        (["--config", "bad.toml"], "steps = nan"),
        (["--data", "\x1b[31mred"], "cannot be read"),
    ],
)
def test_the_command_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("[run]\nsteps = nan")
    if "bomb" in arguments:
        (tmp_path / "bomb").write_bytes(ARRAYS["a bomb"][0])
    assert main(["train", *arguments, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.strip().isprintable()
    assert not (tmp_path / "run").exists()


class memory_at_most:
    """Python's, NumPy's and the process's memory grow by no more than so many bytes."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        tracemalloc.start()
        self.before = peak()

    def __exit__(self, *raised):
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < self.limit and peak() - self.before < self.limit, (most, peak() - self.before)


def peak():
    """The largest resident size of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
