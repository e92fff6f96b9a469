"""Arrays that are costly to make from files, kept on disk and mapped into memory.

An entry is a directory of ``.npy`` files with a manifest of their SHA-256. Its name is a digest of all that the arrays
are made from, so that an entry never has to be brought up to date: other files, or other settings, are another entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...errors import DataError

FORMAT = 1


def cache_directory() -> Path:
    """``$MLPINT_CACHE``, else ``mlpint`` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MLPINT_CACHE") or Path(home) / "mlpint")


def cached(
    sources: Iterable[Path],
    settings: Mapping[str, object],
    build: Callable[[], Mapping[str, np.ndarray]],
    directory: Path | None = None,
) -> dict[str, np.ndarray]:
    """The arrays that ``build`` makes, made once; mapped into memory, read-only.

    Several processes may ask at once: one builds, the others wait. A damaged entry is made again.

    Args:
        sources: files that ``build`` reads; their content counts, not their names.
        settings: whatever else the arrays depend on; JSON.
        build: arrays by name.
        directory: of the cache; :func:`cache_directory` by default.

    Raises:
        DataError: a source that cannot be read, or a cache that cannot be written.
    """
    directory = cache_directory() if directory is None else directory
    key = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode())
    for path in sources:
        key.update(_sha256(path).encode())
    entry = directory / key.hexdigest()[:32]
    try:
        with _lock(directory, entry.name):
            if not _is_whole(entry):
                _write(entry, build())
        return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(entry.glob("*.npy"))}
    except OSError as error:
        raise DataError(
            f"{error.filename or directory}: the cache cannot be used ({error.strerror}); set MLPINT_CACHE to a "
            "directory that can be written"
        ) from None


@contextmanager
def _lock(directory: Path, name: str) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(entry: Path) -> bool:
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        return all(_sha256(entry / file) == digest for file, digest in manifest.items())
    except (OSError, ValueError, AttributeError, DataError):
        return False


def _write(entry: Path, arrays: Mapping[str, np.ndarray]) -> None:
    partial = entry.with_name(f".{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(entry, ignore_errors=True)
    partial.mkdir()
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", array, allow_pickle=False)
    digests = {path.name: _sha256(path) for path in sorted(partial.glob("*.npy"))}
    (partial / "manifest.json").write_text(json.dumps(digests))
    partial.rename(entry)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
