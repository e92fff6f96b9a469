"""Words as features: the word itself if it is frequent enough, its beginning, its end and its shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ...comm.fingerprint import crc

_AFFIXES = (1, 2, 3, 4)
_CAPITALS = re.compile(r"[A-Z]")
_SMALL = re.compile(r"[a-z]")
_DIGITS = re.compile(r"[0-9]")


def features(word: str) -> list[str]:
    """Names of a word's features, the word itself first; always :data:`FEATURES` many, empty where there is none.

    They are the word as it is and in lower case, its shape ("Xx", "d-d": runs of capitals, small letters and digits),
    and its ends and beginnings of up to four letters.
    """
    small = word.lower()
    shape = _DIGITS.sub("d", _SMALL.sub("x", _CAPITALS.sub("X", word)))
    names = [f"word {word}", f"small {small}", "shape " + re.sub(r"(.)\1+", r"\1", shape)[:8]]
    names += [f"end {small[-n:]}" if len(small) >= n else "" for n in _AFFIXES]
    return names + [f"start {small[:n]}" if len(small) >= n else "" for n in _AFFIXES]


FEATURES = len(features("word"))


class WordFeatures:
    """Numbers for the features that are in some text often enough; 0 stands for the others.

    Args:
        words: the text.
        least: how often a feature must be there.
    """

    def __init__(self, words: Iterable[str], least: int = 2) -> None:
        counts = Counter(words)
        of_features: Counter[str] = Counter()
        for word, count in counts.items():
            of_features.update({feature: count for feature in features(word) if feature})
        self.names = sorted(feature for feature, count in of_features.items() if count >= least)
        self.numbers = {name: number for number, name in enumerate(self.names, 1)}
        self.counts = np.array([0, *(of_features[name] for name in self.names)])
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        """Different numbers, 0 included."""
        return len(self.names) + 1

    def __call__(self, words: Sequence[str]) -> np.ndarray:
        """[len(words), FEATURES] int64."""
        for word in words:
            if word not in self._known:
                self._known[word] = [self.numbers.get(feature, 0) for feature in features(word)]
        return np.array([self._known[word] for word in words], np.int64)

    def digest(self) -> str:
        return f"{len(self.names)} features, digest {crc(chr(10).join(self.names).encode())}"
