"""Treebanks in the CoNLL-U format of Universal Dependencies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...errors import DataError
from . import hub
from .files import read_lines, visible_files

# universaldependencies.org/u/pos
UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
)  # fmt: skip
_COLUMNS, _FORM, _UPOS = 10, 1, 3


@dataclasses.dataclass(frozen=True)
class Sentence:
    """Words with their universal parts of speech, as indices into :data:`UPOS`; ``about``: its comments, by name."""

    words: list[str]
    tags: list[int]
    about: dict[str, str]


def read_conllu(path: str | Path) -> list[Sentence]:
    """The sentences of a file, or of all ``.conllu`` and ``.conllu.gz`` files of a directory, in the files' order.

    Of a data set (:mod:`mlpint.training.data.hub`) those to train on, from its columns ``tokens`` and ``upos``.

    Multiword tokens (``1-2``) and empty nodes (``1.1``) are left out: their parts, or the words around, are tagged.

    Raises:
        DataError: naming the file and the line.
    """
    if str(path).startswith(hub.PREFIX):
        return _from_hub(str(path))
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [p for p in visible_files(path) if p.name.removesuffix(".gz").endswith(".conllu")]
        if not files:
            raise DataError(f"{path}: the directory holds no .conllu files")
    return [sentence for file in files for sentence in _sentences(file)]


def _from_hub(name: str) -> list[Sentence]:
    train, _ = hub.splits(name)
    words, tags = hub.column(train, name, "tokens", "words"), hub.column(train, name, "upos", "pos_tags")
    names = hub.class_names(train, tags)
    sentences = []
    for number, (row, labels) in enumerate(zip(train[words], train[tags], strict=True)):
        upos = [names[label] if names and isinstance(label, int) else str(label) for label in labels]
        unknown = [tag for tag in upos if tag not in UPOS and tag != "_"]
        if unknown or len(row) != len(upos):
            what = f"the tag {unknown[0]!r}" if unknown else f"{len(row)} words and {len(upos)} tags"
            raise DataError(f"{name}: row {number} has {what}; UPOS are {', '.join(UPOS)}")
        kept = [(word, UPOS.index(tag)) for word, tag in zip(row, upos, strict=True) if tag != "_"]
        if kept:
            about = {"sent_id": f"row {number}"}
            sentences.append(Sentence([word for word, _ in kept], [tag for _, tag in kept], about))
    if not sentences:
        raise DataError(f"{name}: holds no sentences")
    return sentences


def _sentences(path: Path) -> list[Sentence]:
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[int] = []
    about: dict[str, str] = {}
    for number, line in enumerate([*read_lines(path), ""], 1):
        if line.startswith("#"):
            name, equals, value = line[1:].partition("=")
            if equals:
                about[name.strip()] = value.strip()
        elif line.strip():
            columns = line.split("\t")
            if len(columns) != _COLUMNS:
                raise DataError(
                    f"{path}: line {number} has {len(columns)} columns between tabs; CoNLL-U has {_COLUMNS}"
                )
            if not columns[0].isdigit():
                continue
            if columns[_UPOS] not in UPOS:
                raise DataError(f"{path}: line {number} has the tag {columns[_UPOS]!r}; UPOS are {', '.join(UPOS)}")
            words.append(columns[_FORM])
            tags.append(UPOS.index(columns[_UPOS]))
        else:
            if words:
                sentences.append(Sentence(words, tags, about))
                # What is said of a document holds for the sentences that follow, too.
                about = {name: value for name, value in about.items() if name.startswith(("newdoc", "meta::"))}
            words, tags = [], []
    if not sentences:
        raise DataError(f"{path}: holds no sentences")
    return sentences
