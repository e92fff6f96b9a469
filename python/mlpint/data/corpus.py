"""Texts and token files as arrays of tokens with a held-out part."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ..errors import DataError
from .embedded import embedded_text
from .files import read, visible_files

GPT2_VOCABULARY = 50257


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out.

    Args:
        train: [n] uint8 bytes of text, or uint16 tokens mapped from a file.
        validation: the same, held out.
        vocabulary: number of different tokens; larger than every token.
        name: where the text came from.
    """

    train: np.ndarray
    validation: np.ndarray
    vocabulary: int
    name: str

    @property
    def is_text(self) -> bool:
        """Whether tokens are bytes."""
        return self.train.dtype == np.uint8

    def decode(self, tokens: list[int]) -> str:
        """Text of the tokens; token numbers where they are not bytes."""
        if self.is_text:
            return bytes(token & 0xFF for token in tokens).decode("utf-8", errors="replace")
        return " ".join(map(str, tokens))


def load(path: str, sequence: int, vocabulary: int = 0, validation: str = "") -> Corpus:
    """Reads training text. The last tenth is held out, if ``validation`` names nothing else to validate on.

    Args:
        path: text file, text.gz, directory of these, ``.bin`` file of little-endian uint16 tokens (as nanoGPT writes
            them), or a directory with ``train.bin`` and ``val.bin``, which is held out. Empty: :func:`embedded_text`.
        sequence: tokens per sequence; each part must hold at least one, and the token that follows it.
        vocabulary: 0 takes 256 for text and GPT-2's for ``.bin``.
        validation: text or tokens like those of ``path``.

    Raises:
        DataError: naming the path, and what is wrong with it.
    """
    where, name = Path(path), path or "embedded text"
    pair = path and not validation and (where / "train.bin").exists() and (where / "val.bin").exists()
    train = _tokens(where / "train.bin") if pair else _read(path)
    if pair:
        held_out = _tokens(where / "val.bin")
    elif validation:
        held_out = _read(validation)
    else:
        train, held_out = _split(train, sequence)
    is_text = train.dtype == np.uint8
    if held_out.dtype != train.dtype:
        kinds = ("text", "tokens") if is_text else ("tokens", "text")
        raise DataError(f"{name} holds {kinds[0]} and {validation} {kinds[1]}: must be of one kind")
    if min(len(train), len(held_out)) < sequence + 1:
        raise DataError(
            f"{name}: {len(train)} tokens to train on and {len(held_out)} held out are too few for sequence = "
            f"{sequence}; at least {sequence + 1} of each are needed"
        )
    if is_text and 0 < vocabulary < 256:
        raise DataError(f"vocabulary = {vocabulary}: must be at least 256 for {name}, which is read as bytes")
    return Corpus(train, held_out, vocabulary or (256 if is_text else GPT2_VOCABULARY), name)


def _read(path: str) -> np.ndarray:
    if not path:
        return np.frombuffer(embedded_text(), np.uint8)
    return _tokens(Path(path)) if path.endswith(".bin") else np.frombuffer(_text(Path(path)), np.uint8)


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
        return read(path)
    texts = (read(p) for p in visible_files(path))
    found = [text for text in texts if b"\0" not in text[:8192]]  # as git tells text from binary files
    if not found:
        raise DataError(f"{path}: the directory holds no text files")
    return b"\n".join(found)
