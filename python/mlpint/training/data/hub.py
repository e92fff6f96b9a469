"""Data sets of the Hugging Face ``datasets`` library: ``hf:NAME`` or ``hf:NAME:CONFIGURATION`` instead of a path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf:"


def splits(name: str) -> tuple[Dataset, Dataset | None]:
    """The split to train on, and the one to validate on if there is one.

    Args:
        name: as in ``load_dataset``, the name of a data set on the hub or a local directory, with :data:`PREFIX`.

    Raises:
        DataError: without the library, or whatever it raises, in one line.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: needs the datasets library; pip install datasets") from None
    path, _, configuration = name.removeprefix(PREFIX).partition(":")
    try:
        parts = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # of many kinds: no such data set, no network, broken files
        raise DataError(f"{name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
    if "train" not in parts:
        raise DataError(f"{name}: has the splits {', '.join(parts)}; must have train")
    return parts["train"], next((parts[n] for n in ("validation", "test") if n in parts), None)


def column(dataset: Dataset, name: str, *choices: str) -> str:
    """The first of some columns that a data set has.

    Raises:
        DataError: it has none of them.
    """
    for choice in choices:
        if choice in dataset.column_names:
            return choice
    raise DataError(f"{name}: has the columns {', '.join(dataset.column_names)}; must have {' or '.join(choices)}")


def class_names(dataset: Dataset, name: str) -> list[str] | None:
    """Names of the classes of a column of labels, or of lists of labels; None where they are plain numbers."""
    feature = dataset.features[name]
    return getattr(getattr(feature, "feature", feature), "names", None)
