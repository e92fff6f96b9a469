"""Texts and token files as arrays of tokens with a held-out part."""

from __future__ import annotations

import codecs
import dataclasses
from pathlib import Path

import numpy as np

from ...errors import DataError
from . import hub
from .embedded import embedded_text
from .files import read, visible_files
from .subwords import Subwords, to_subwords

GPT2_VOCABULARY = 50257


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out.

    Args:
        train: [n] uint8 bytes of text, or uint16 tokens mapped from a file.
        validation: the same, held out.
        vocabulary: number of different tokens; larger than every token.
        name: where the text came from.
        subwords: what tokens stand for; None for bytes and for tokens of somebody else's.
    """

    train: np.ndarray
    validation: np.ndarray
    vocabulary: int
    name: str
    subwords: Subwords | None = None

    @property
    def identity(self) -> str:
        """What a model's tokens are, for comparison with a checkpoint's."""
        return self.subwords.identity if self.subwords else f"{self.vocabulary} tokens"

    @property
    def is_text(self) -> bool:
        """Whether tokens are bytes."""
        return self.train.dtype == np.uint8

    def check(self, tokens: np.ndarray) -> None:
        """Raises a DataError if some of the tokens are outside the vocabulary."""
        largest = int(tokens.max())
        if largest >= self.vocabulary:
            raise DataError(
                f"{self.name}: token {largest} is outside the vocabulary of {self.vocabulary}; "
                "give a larger --vocabulary"
            )

    def check_samples(self, samples: int = 64, length: int = 1 << 16) -> None:
        """The same of up to so many stretches of both parts; all of a file of up to 4 million tokens."""
        for part in (self.train, self.validation):
            for start in np.unique(np.linspace(0, max(len(part) - length, 0), samples).astype(np.int64)):
                self.check(part[start : start + length])

    def decode(self, tokens: list[int]) -> str:
        """Text of the tokens; token numbers where they are not bytes."""
        if self.subwords is not None:
            return self.subwords.decode(tokens)
        if self.is_text:
            return bytes(token & 0xFF for token in tokens).decode("utf-8", errors="replace")
        return " ".join(map(str, tokens))


def load(path: str, sequence: int, vocabulary: int = 0, validation: str = "", tokenizer: str = "bytes") -> Corpus:
    """Reads training text. The last tenth is held out, if ``validation`` names nothing else to validate on.

    Args:
        path: text file, text.gz, directory of these, ``.bin`` file of little-endian uint16 tokens (as nanoGPT writes
            them), or a directory with ``train.bin`` and ``val.bin``, which is held out; or a data set with a column
            ``text`` (see :mod:`mlpint.training.data.hub`). Empty: :func:`embedded_text`.
        sequence: tokens per sequence; each part must hold at least one, and the token that follows it.
        vocabulary: 0 takes 256 for text and GPT-2's for ``.bin``.
        validation: text or tokens like those of ``path``.
        tokenizer: of text: ``"bytes"``; ``"bpe"`` for byte pairs, ``vocabulary`` of them; or the ``tokenizer.json`` of
            a run that had these.

    Raises:
        DataError: naming the path, and what is wrong with it.
    """
    where, name = Path(path), path or "embedded text"
    pair = path and not validation and (where / "train.bin").exists() and (where / "val.bin").exists()
    held_out: np.ndarray | None = None
    if pair:
        train, held_out = _tokens(where / "train.bin"), _tokens(where / "val.bin")
    elif path.startswith(hub.PREFIX):
        train, held_out = _from_hub(path)
    else:
        train = _read(path)
    if validation:
        held_out = _from_hub(validation)[0] if validation.startswith(hub.PREFIX) else _read(validation)
    if held_out is None:
        train, held_out = _split(train, sequence)
    is_text = train.dtype == np.uint8
    if held_out.dtype != train.dtype:
        kinds = ("text", "tokens") if is_text else ("tokens", "text")
        raise DataError(f"{name} holds {kinds[0]} and {validation} {kinds[1]}: must be of one kind")
    subwords = None
    if tokenizer != "bytes":
        if not is_text:
            raise DataError(f"tokenizer = {tokenizer!r}: {name} holds tokens already")
        train, held_out, subwords = to_subwords(train, held_out, vocabulary, tokenizer)
        vocabulary, is_text = subwords.vocabulary, False
    if min(len(train), len(held_out)) < sequence + 1:
        raise DataError(
            f"{name}: {len(train)} tokens to train on and {len(held_out)} held out are too few for sequence = "
            f"{sequence}; at least {sequence + 1} of each are needed"
        )
    if is_text and 0 < vocabulary < 256:
        raise DataError(f"vocabulary = {vocabulary}: must be at least 256 for {name}, which is read as bytes")
    return Corpus(train, held_out, vocabulary or (256 if is_text else GPT2_VOCABULARY), name, subwords)


def _read(path: str) -> np.ndarray:
    if not path:
        return np.frombuffer(embedded_text(), np.uint8)
    return _tokens(Path(path)) if path.endswith(".bin") else np.frombuffer(_text(Path(path)), np.uint8)


def _from_hub(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    def text(part: hub.Dataset) -> np.ndarray:
        return np.frombuffer("\n".join(part[hub.column(part, name, "text")]).encode(), np.uint8)

    train, held_out = hub.splits(name)
    return text(train), None if held_out is None else text(held_out)


def _split(tokens: np.ndarray, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    held_out = min(max(len(tokens) // 10, sequence + 1), len(tokens))
    return tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]


def _tokens(path: Path) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise DataError(f"{path}: {size} bytes are not a file of uint16 tokens")
        return np.memmap(path, dtype="<u2", mode="r")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _text(path: Path) -> bytes:
    if not path.is_dir():
        text = read(path)
        if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path}: is UTF-16; must be UTF-8")
        return text
    texts = (read(p) for p in visible_files(path))
    readable = [text for text in texts if b"\0" not in text[:8192]]  # as git tells text from binary files
    if not readable:
        raise DataError(f"{path}: the directory holds no text files")
    return b"\n".join(readable)
