"""Texts with the class of each: sentences of treebanks, tables with tabs between columns, data sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...errors import DataError
from . import hub
from .conllu import read_conllu
from .files import read_lines

TREEBANK_LABEL, TABLE_LABEL = "s_type", "label"  # the sentence types of UD English GUM; the column of most data sets
_TEXT_COLUMNS = "text", "sentence"


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """A text and its class; ``place``: where it stands, for messages."""

    text: str
    label: str
    place: str


def load_labelled(path: str, validation: str = "", label: str = "") -> tuple[list[LabelledText], list[LabelledText]]:
    """Texts to train on and texts held out: each tenth one from the last on, if there are no others to validate on.

    Args:
        path: a CoNLL-U file or a directory of these (text and class from the sentences' comments; one on a document
            goes for all its sentences), a ``.tsv`` file whose first line names the columns, both with or without
            ``.gz``, or a data set (:mod:`mlpint.training.data.hub`). Columns of texts are ``text`` or ``sentence``.
        validation: texts like those of ``path``, of classes that it has.
        label: comment or column with the class; empty: :data:`TREEBANK_LABEL` in treebanks, else
            :data:`TABLE_LABEL`.

    Raises:
        DataError: naming the file and the place in it; no class, no text, fewer than two classes, an unknown class.
    """
    training, held_out = _read(path, label)
    classes = sorted({text.label for text in training})
    if len(classes) < 2:
        raise DataError(f"{path}: has only the class {classes[0]!r}; at least 2 are needed")
    if validation:
        held_out = _read(validation, label)[0]
    if held_out is None:
        kept = {n for n in range(len(training)) if (len(training) - 1 - n) % 10}
        held_out = [text for n, text in enumerate(training) if n not in kept]
        training = [training[n] for n in sorted(kept)]
    unknown = next((text for text in held_out if text.label not in classes), None)
    if unknown is not None:
        raise DataError(
            f"{validation or path}: {unknown.place} has the class {unknown.label!r}, unknown in {path}; its classes "
            f"are {_some(classes)}"
        )
    return training, held_out


def _read(path: str, label: str) -> tuple[list[LabelledText], list[LabelledText] | None]:
    """A file's texts and None, or those of a data set to train on and to validate on."""
    if path.startswith(hub.PREFIX):
        train, held_out = hub.splits(path)
        label = label or TABLE_LABEL
        return _from_hub(path, train, label), None if held_out is None else _from_hub(path, held_out, label)
    where, name = Path(path), Path(path).name.removesuffix(".gz")
    if name.endswith(".tsv") and not where.is_dir():
        return _from_table(where, label or TABLE_LABEL), None
    if not name.endswith(".conllu") and not where.is_dir() and where.exists():
        raise DataError(f"{path}: must be a .conllu or .tsv file, with or without .gz, or a directory of .conllu files")
    return _from_treebank(path, label or TREEBANK_LABEL), None


def _from_treebank(path: str, label: str) -> list[LabelledText]:
    texts = []
    for number, sentence in enumerate(read_conllu(path), 1):
        place = f"sentence {sentence.about.get('sent_id', number)}"
        for name in ("text", label):
            if not sentence.about.get(name):
                raise DataError(
                    f"{path}: {place} has no comment '# {name} = ...'; it has {_some(list(sentence.about)) or 'none'}"
                )
        texts.append(_checked(path, LabelledText(sentence.about["text"], sentence.about[label], place), "text", label))
    return texts


def _from_table(path: Path, label: str) -> list[LabelledText]:
    header, *lines = (line.split("\t") for line in read_lines(path))
    text = next((name for name in _TEXT_COLUMNS if name in header), None)
    if text is None or label not in header:
        wanted = label if text else " or ".join(_TEXT_COLUMNS)
        raise DataError(f"{path}: has the columns {_some(header)}; must have {wanted}")
    texts = []
    for number, fields in enumerate(lines, 2):
        if len(fields) != len(header):
            raise DataError(f"{path}: line {number} has {len(fields)} columns between tabs, the header {len(header)}")
        row = dict(zip(header, fields, strict=True))
        texts.append(_checked(path, LabelledText(row[text], row[label], f"line {number}"), text, label))
    if not texts:
        raise DataError(f"{path}: has a header and no texts")
    return texts


def _from_hub(name: str, part: hub.Dataset, label: str) -> list[LabelledText]:
    text_column, label_column = hub.column(part, name, *_TEXT_COLUMNS), hub.column(part, name, label)
    names = hub.class_names(part, label_column)
    texts = []
    for number, (text, value) in enumerate(zip(part[text_column], part[label_column], strict=True)):
        if names and isinstance(value, int):
            value = names[value] if value >= 0 else None  # -1 where the classes are kept secret
        labelled = LabelledText(text, "" if value is None else str(value), f"row {number}")
        texts.append(_checked(name, labelled, text_column, label_column))
    if not texts:
        raise DataError(f"{name}: holds no texts")
    return texts


def _checked(path: str | Path, labelled: LabelledText, text: str, label: str) -> LabelledText:
    for column, value in ((text, labelled.text), (label, labelled.label)):
        if not value:
            raise DataError(f"{path}: {labelled.place} has nothing in the column {column}")
    if not labelled.label.isprintable():
        raise DataError(f"{path}: {labelled.place} has the class {labelled.label!r}; must be printable characters")
    return labelled


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
