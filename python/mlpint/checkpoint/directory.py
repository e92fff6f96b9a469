"""The directory of a run's checkpoints: the names in it, the switch from one checkpoint to the next, and deletion.

A save may be killed at any moment. What has the name of a checkpoint is whole, and ``latest`` moves by one rename
before anything that it named is touched. So a step that is saved again, by a run that was resumed before it, gets the
first free of the names ``step-00000100``, ``step-00000100.2``, ... and only then loses its older directory. What a
killed save leaves behind has a hidden name or is a second directory of its step, and the next save deletes it.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"step-(\d{8,})(\.\d+)?")
_HIDDEN = re.compile(r"\.(step-.*|latest)\.(partial|deleted|replaced)(\.\d+)?")  # "replaced": by earlier versions


def is_name(name: str) -> bool:
    """Whether a checkpoint may have this name."""
    return _NAME.fullmatch(name) is not None


def find(path: Path) -> Path:
    """The same path, but where ``step-00000100`` is not there, that step's directory of another name."""
    if is_name(path.name) and not path.exists() and path.parent.is_dir():
        return next(iter(_by_step(path.parent).get(_step(path), [])), path)
    return path


def begin(directory: Path, step: int) -> tuple[Path, Path]:
    """Makes a hidden directory to write a checkpoint into; the path that it will have, and the one that it has."""
    directory.mkdir(parents=True, exist_ok=True)
    delete_leftovers(directory)
    final = _free(directory / f"step-{step:08d}")
    partial = _free(directory / f".{final.name}.partial")
    partial.mkdir()
    return final, partial


def publish(partial: Path, final: Path) -> None:
    """Gives a checkpoint that is whole its name, and has ``latest`` name it."""
    sync(partial)
    partial.rename(final)
    sync(final.parent)  # latest never names, not even after a power cut, what is not there
    new = final.with_name(".latest.partial")
    write_text(new, final.name + "\n")
    new.rename(final.with_name("latest"))
    sync(final.parent)


def delete_leftovers(directory: Path) -> None:
    """Deletes hidden files, and of each step all directories but one.

    That one is what ``latest`` names, else, where a save was killed before ``latest`` moved, the newest.
    """
    for path in directory.iterdir():
        if _HIDDEN.fullmatch(path.name):
            _remove(path)
    latest = directory / "latest"
    current = latest.read_bytes().decode(errors="replace").strip() if latest.exists() else ""
    for paths in _by_step(directory).values():
        for path in sorted(paths, key=lambda p: (p.name == current, p.stat().st_mtime_ns))[:-1]:
            _delete(path)


def delete_all_but(keep: int, newest: Path) -> None:
    """Deletes the checkpoints of steps before the last ``keep``, those after ``newest`` not counted.

    A run that was resumed earlier has yet to come by those again.
    """
    by_step = _by_step(newest.parent)
    for step in sorted(step for step in by_step if step <= _step(newest))[:-keep]:
        for path in by_step[step]:
            _delete(path)


def write_text(path: Path, text: str) -> None:
    """Writes a file and waits until it is on disk."""
    try:
        path.write_text(text, encoding="utf-8")
        sync(path)
    except OSError as error:  # of a full disk it would not say where
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _by_step(directory: Path) -> dict[int, list[Path]]:
    """The checkpoints by step; of a step there are two only where it is being, or was to be, saved again."""
    by_step: dict[int, list[Path]] = {}
    for path in directory.iterdir():
        if is_name(path.name):
            by_step.setdefault(_step(path), []).append(path)
    return by_step


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-").partition(".")[0])


def _free(path: Path) -> Path:
    """The first of this path, the path with ``.2`` behind it, with ``.3``, ... that does not exist."""
    names = itertools.chain([path.name], (f"{path.name}.{n}" for n in itertools.count(2)))
    return next(free for name in names if not (free := path.with_name(name)).exists())


def _delete(path: Path) -> None:
    """Deletes a checkpoint. It loses its name first, so that there is never half of one under it."""
    hidden = _free(path.with_name(f".{path.name}.deleted"))
    path.rename(hidden)
    _remove(hidden)


def _remove(path: Path) -> None:
    """Deletes what is hidden. What cannot be deleted is in nobody's way, and the next save tries again."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
