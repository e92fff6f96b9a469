"""Text as byte pairs instead of bytes, made once and mapped into memory."""

from __future__ import annotations

import hashlib

import numpy as np

from ...errors import ConfigError
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

    def decode(self, tokens: list[int]) -> str:
        """Spaces at the ends of lines are lost."""
        lines: list[list[int]] = [[]]
        for token in tokens:
            if token == END:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(self.pairs.decode(line) for line in lines)


def to_subwords(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray, Subwords]:
    """Learns byte pairs from bytes of text and turns both texts into tokens; from the cache where that has been done.

    Args:
        train, held_out: [n] uint8.
        vocabulary: tokens at most; 0: 4,096.

    Raises:
        ConfigError: without the tokenizers library, or a vocabulary too small.
    """
    vocabulary = vocabulary or _DEFAULT
    if vocabulary < SMALLEST:
        raise ConfigError(f"vocabulary = {vocabulary}: must be at least {SMALLEST} for byte pairs")
    try:
        from tokenizers import __version__ as version
    except ImportError:
        raise ConfigError("tokenizer = 'bpe': needs the tokenizers library; pip install tokenizers") from None

    def build() -> dict[str, np.ndarray]:
        texts = [part.tobytes().decode("utf-8", errors="replace").split("\n") for part in (train, held_out)]
        pairs = BytePairs.learn(texts[0], vocabulary)
        tokens = [np.array([t for line in pairs.encode(lines) for t in line], _smallest(vocabulary)) for lines in texts]
        return {"train": tokens[0], "held_out": tokens[1], "pairs": np.frombuffer(pairs.saved, np.uint8)}

    digests = [hashlib.sha256(part.tobytes()).hexdigest() for part in (train, held_out)]
    settings = {"text": digests, "vocabulary": vocabulary, "tokenizers": version}
    arrays = cached([], settings, build)
    return arrays["train"], arrays["held_out"], Subwords(arrays["pairs"].tobytes())


def _smallest(vocabulary: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32
