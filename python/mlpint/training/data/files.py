"""Files of data, with or without gzip."""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from pathlib import Path

from ...errors import DataError

_PLENTY, _RATIO = 128 << 20, 20


def most_unpacked(packed: int) -> int:
    """Bytes that a compressed file of so many bytes may hold: 128 MiB, or 20 times its size if that is more.

    Text and images are compressed to a tenth at best; a file made to fill the memory (a bomb) to a thousandth.
    """
    return max(_PLENTY, _RATIO * packed)


def read(path: Path) -> bytes:
    """A file's content; that of a ``.gz`` decompressed.

    Raises:
        DataError: naming the file; also a ``.gz`` that holds more than :func:`most_unpacked`.
    """
    try:
        status = path.stat()
        if stat.S_ISCHR(status.st_mode):
            raise DataError(f"{path}: is a device, not a file")
        return _unpacked(path, status.st_size) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is not a gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _unpacked(path: Path, size: int) -> bytes:
    content, limit = io.BytesIO(), most_unpacked(size)
    with gzip.open(path) as file:
        while part := file.read(1 << 20):
            content.write(part)
            if content.tell() > limit:
                raise DataError(
                    f"{path}: its {size:,} bytes hold more than {limit:,}, which no text does; decompress it if it is "
                    "right"
                )
    return content.getvalue()


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, split at newlines alone.

    Raises:
        DataError: naming the file; it cannot be read, is empty, is not UTF-8 or has other line ends.
    """
    content = read(path)
    if not content.strip():
        raise DataError(f"{path}: is empty")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start})") from None
    if "\0" in text:
        raise DataError(f"{path}: is not text: it holds NUL characters, as UTF-16 does; must be UTF-8")
    text = text.replace("\r\n", "\n")
    if "\r" in text and "\n" not in text:
        raise DataError(f"{path}: its lines end in CR alone; must end in LF or CR LF")
    return text.removesuffix("\n").split("\n")


def visible_files(directory: Path) -> list[Path]:
    """All files below a directory, hidden ones left out, in an order that does not depend on the machine."""
    visible = (p for p in directory.rglob("*") if not any(q.startswith(".") for q in p.relative_to(directory).parts))
    return sorted(p for p in visible if p.is_file())
