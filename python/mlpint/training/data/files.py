"""Files of data, with or without gzip."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from ...errors import DataError


def read(path: Path) -> bytes:
    """A file's content; that of a ``.gz`` decompressed.

    Raises:
        DataError: naming the file.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is not a gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, split at newlines alone.

    Raises:
        DataError: naming the file; it cannot be read, is empty or is not UTF-8.
    """
    content = read(path)
    if not content.strip():
        raise DataError(f"{path}: is empty")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start})") from None
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def visible_files(directory: Path) -> list[Path]:
    """All files below a directory, hidden ones left out, in an order that does not depend on the machine."""
    visible = (p for p in directory.rglob("*") if not any(q.startswith(".") for q in p.relative_to(directory).parts))
    return sorted(p for p in visible if p.is_file())
