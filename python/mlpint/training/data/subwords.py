"""Text as byte pairs instead of bytes, made once and mapped into memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from ...errors import ConfigError, DataError
from .bpe import END, SMALLEST, BytePairs
from .cache import cached

_DEFAULT = 4096


class Subwords:
    """Byte pairs as a corpus has them: each line of the text ends with an end token.

    Args:
        saved: of the :class:`BytePairs`.
    """

    def __init__(self, saved: bytes) -> None:
        self.pairs = BytePairs(saved)
        self.vocabulary = self.pairs.vocabulary
        self.digest = hashlib.sha256(saved).hexdigest()[:8]

    @property
    def identity(self) -> str:
        """What a model's tokens are, for comparison with a checkpoint's."""
        return f"{self.vocabulary} tokens, digest {self.digest}"

    def decode(self, tokens: list[int]) -> str:
        """Spaces at the ends of lines are lost."""
        lines: list[list[int]] = [[]]
        for token in tokens:
            if token == END:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(self.pairs.decode(line) for line in lines)


def to_subwords(
    train: np.ndarray, held_out: np.ndarray, vocabulary: int, tokenizer: str
) -> tuple[np.ndarray, np.ndarray, Subwords]:
    """Turns both texts into tokens, by byte pairs learnt from the first or read; from the cache if that has been done.

    Args:
        train, held_out: [n] uint8.
        vocabulary: tokens at most; 0: 4,096, or as many as there are in the file.
        tokenizer: ``"bpe"``, or what a run saved, for :func:`read_subwords`.

    Raises:
        ConfigError: without the tokenizers library, or a vocabulary too small.
        DataError: what :func:`read_subwords` raises.
    """
    version = _version()
    known = None if tokenizer == "bpe" else read_subwords(tokenizer, vocabulary)
    if known is None:
        vocabulary = vocabulary or _DEFAULT
        if vocabulary < SMALLEST:
            raise ConfigError(f"vocabulary = {vocabulary}: must be at least {SMALLEST} for byte pairs")

    def build() -> dict[str, np.ndarray]:
        texts = [part.tobytes().decode("utf-8", errors="replace").split("\n") for part in (train, held_out)]
        pairs = BytePairs.learn(texts[0], vocabulary) if known is None else known.pairs
        kind = _smallest(pairs.vocabulary)
        tokens = [np.array([t for line in pairs.encode(lines) for t in line], kind) for lines in texts]
        return {"train": tokens[0], "held_out": tokens[1], "pairs": np.frombuffer(pairs.saved, np.uint8)}

    digests = [hashlib.sha256(part.tobytes()).hexdigest() for part in (train, held_out)]
    settings = {"text": digests, "vocabulary": vocabulary, "tokenizers": version, "pairs": known and known.digest}
    arrays = cached([], settings, build)
    return arrays["train"], arrays["held_out"], Subwords(arrays["pairs"].tobytes())


def read_subwords(path: str, vocabulary: int = 0) -> Subwords:
    """The byte pairs that a run with ``tokenizer = "bpe"`` has left in its directory as ``tokenizer.json``.

    Raises:
        ConfigError: without the tokenizers library; another number of tokens than ``vocabulary``, where that is given.
        DataError: a file that cannot be read, or is none of byte pairs.
    """
    _version()
    try:
        subwords = Subwords(Path(path).read_bytes())
    except OSError as error:
        raise DataError(
            f"tokenizer = {path!r}: cannot be read ({error.strerror}); must be bytes, bpe or a file"
        ) from None
    except Exception as error:  # whatever kind the library raises
        raise DataError(f"tokenizer = {path!r}: is no tokenizer.json ({error})") from None
    if vocabulary not in (0, subwords.vocabulary):
        raise ConfigError(f"vocabulary = {vocabulary}: must be {subwords.vocabulary}, as in {path}, or left out")
    return subwords


def _version() -> str:
    try:
        from tokenizers import __version__ as version
    except ImportError:
        raise ConfigError("tokenizer: byte pairs need the tokenizers library; pip install tokenizers") from None
    return version


def _smallest(vocabulary: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32
