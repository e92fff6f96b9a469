"""Parallel text: files of sentences and of their translations, line by line."""

from __future__ import annotations

import dataclasses
import glob
import math
from collections import Counter
from pathlib import Path

from ...errors import DataError
from . import hub
from .files import read_lines

HELD_OUT = ("val", "valid", "validation", "dev")
_MOST_HELD_OUT = 1000


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Pairs of sentences, neither of them empty.

    Attributes:
        source, target: a sentence and its translation have the same index.
        names: of both files.
        lines: number of each pair's line in them, from 1.
        left_out: lines where one side or both are empty.
    """

    source: list[str]
    target: list[str]
    names: tuple[str, str]
    lines: list[int]
    left_out: int

    def part(self, start: int, stop: int) -> Sentences:
        return Sentences(
            self.source[start:stop], self.target[start:stop], self.names, self.lines[start:stop], self.left_out
        )


def find(data: str, source: str, target: str) -> dict[str, tuple[Path, Path]]:
    """The files of each split: ``train``, and ``validation`` and ``test`` where there are such.

    Args:
        data: a directory with ``train.de``, ``train.en``, ``val.de``, ...; or what the names of such files start with:
            ``corpus`` for ``corpus-train.de`` or ``corpus.train.de``, or for ``corpus.de`` alone. Each may end in
            ``.gz``; the names of test files may go on after ``test``.
        source, target: languages, the endings of the names.

    Raises:
        DataError: there is no text to train on, or a file without its counterpart.
    """
    files = {}
    for split, names in (("train", ("train", "")), ("validation", HELD_OUT), ("test", ("test", "test*"))):
        a, b = (next((p for name in names for p in _named(data, name, end)), None) for end in (source, target))
        if a and b:
            files[split] = a, b
        elif a or b:
            raise DataError(f"{a or b}: there is no such file that ends in .{target if a else source}, its translation")
    if "train" not in files:
        looked = [f"{data}/train.{source}"] if Path(data).is_dir() else [f"{data}-train.{source}", f"{data}.{source}"]
        raise DataError(
            f"{data}: no parallel text; looked for {' and '.join(looked)} (or .gz) and the same in '{target}'; "
            "name a directory or what the files' names start with, and the languages by --source and --target"
        )
    return files


def _named(data: str, split: str, language: str) -> list[Path]:
    base = Path(data)
    if base.is_dir():
        stems = [f"{glob.escape(str(base))}/{split}"] if split else []
    else:
        stems = [f"{glob.escape(str(base))}{mark}{split}" for mark in "-."] if split else [glob.escape(str(base))]
    patterns = (f"{stem}.{glob.escape(language)}{ending}" for stem in stems for ending in ("", ".gz"))
    return [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern)) if Path(path).is_file()]


def load(data: str, source: str, target: str, validation: str = "") -> dict[str, Sentences]:
    """The sentences of each split. Where no file is held out, the last tenth of the text is, 1,000 pairs at most.

    Args:
        data, source, target: as for :func:`find`; or a data set (see :mod:`mlpint.training.data.hub`) with a column for
            each language, or with a column ``translation`` of both.
        validation: ``held`` for the held-out text in ``held.de`` and ``held.en``, or a data set.

    Raises:
        DataError: what :func:`find` raises; files that cannot be read, that differ in their number of lines, or that
            are in other languages than the names say.
    """
    splits = _splits(data, source, target)
    if validation:
        splits["validation"] = _splits(validation, source, target)["train"]
    train = splits["train"]
    for name in ("validation", "test"):
        if name in splits:
            _check_languages(splits[name], train)
    if "validation" not in splits:
        count = len(train.source)
        held_out = min(max(1, count // 10), _MOST_HELD_OUT)
        if count < 2:
            raise DataError(f"{train.names[0]}: one pair of sentences is too little to train on and to hold some out")
        splits |= {"train": train.part(0, count - held_out), "validation": train.part(count - held_out, count)}
    return splits


def _splits(data: str, source: str, target: str) -> dict[str, Sentences]:
    if not data.startswith(hub.PREFIX):
        return {split: _of_files(paths) for split, paths in find(data, source, target).items()}
    parts = zip(("train", "validation"), hub.splits(data), strict=True)
    return {split: _of_data_set(data, split, part, (source, target)) for split, part in parts if part is not None}


def _of_files(paths: tuple[Path, Path]) -> Sentences:
    source, target = paths
    return _pairs(read_lines(source), read_lines(target), (str(source), str(target)))


def _of_data_set(data: str, split: str, part: hub.Dataset, languages: tuple[str, str]) -> Sentences:
    if "translation" in part.column_names:
        rows = list(part["translation"])
        if rows and not all(language in rows[0] for language in languages):
            has, wanted = ", ".join(rows[0]), " and ".join(languages)
            raise DataError(f"{data}: has translations between {has}; must have {wanted}")
        source, target = ([row[language] for row in rows] for language in languages)
    else:
        source, target = (list(part[hub.column(part, data, language)]) for language in languages)
    return _pairs(source, target, (f"{data}, {split}.{languages[0]}", f"{data}, {split}.{languages[1]}"))


def _pairs(source: list[str], target: list[str], names: tuple[str, str]) -> Sentences:
    if len(source) != len(target):
        raise DataError(
            f"{names[0]}: has {len(source)} lines, {names[1]} has {len(target)}; line n of the one has to be the "
            "translation of line n of the other"
        )
    sides = [[line.strip() for line in lines] for lines in (source, target)]
    if sides[0] == sides[1]:
        raise DataError(f"{names[0]}: holds the same text as {names[1]}, not its translation")
    kept = [n for n, pair in enumerate(zip(*sides, strict=True)) if all(pair)]
    if not kept:
        raise DataError(f"{names[0]}: no line of it and of {names[1]} holds text on both sides")
    source, target = ([side[n] for n in kept] for side in sides)
    return Sentences(source, target, names, [n + 1 for n in kept], len(sides[0]) - len(kept))


def _check_languages(held_out: Sentences, train: Sentences) -> None:
    """Whether each side has the words of its side in the training text, rather than those of the other side."""
    own = _words(train.source), _words(train.target)
    for side, sentences in enumerate((held_out.source, held_out.target)):
        words = _words(sentences)
        if _cosine(words, own[1 - side]) > 2 * _cosine(words, own[side]):
            raise DataError(
                f"{held_out.names[side]}: is in the language of {train.names[1 - side]}, by its words, and not in that "
                f"of {train.names[side]}; the files have been mixed up"
            )


def _words(sentences: list[str]) -> Counter[str]:
    return Counter(word for sentence in sentences for word in sentence.lower().split())


def _cosine(a: Counter[str], b: Counter[str]) -> float:
    norms = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return sum(n * b[word] for word, n in a.items()) / norms
