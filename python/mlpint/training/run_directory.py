"""The directory of a run: found or made, tried for writing, and kept from other jobs for as long as the run lasts."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..checkpoint import Checkpoint
from ..comm.collectively import collectively
from ..comm.communicator import Comm
from ..errors import ConfigError, UserError
from .config import TrainConfig

_PROBE = 1 << 16  # bytes: a full disk takes the name of a file and not its content
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def run_directory(config: TrainConfig, comm: Comm, checkpoint: Checkpoint | None) -> Iterator[Path]:
    """The directory that rank 0 has found or made, which no other job writes to meanwhile. Collective.

    Raises:
        UserError: on all ranks; it holds a run already, another job is at work there, or it cannot be written.
    """
    with ExitStack() as held:

        def make() -> str:
            if comm.rank:
                return ""
            path = _made(config, checkpoint)
            held.enter_context(_claimed(path))
            if checkpoint is None and (path / "metrics.jsonl").exists():
                raise ConfigError(f"out = '{path}': holds a run already; go on with --resume {path}, or name another")
            return str(path)

        yield Path(collectively(comm, make)[0])


def _made(config: TrainConfig, checkpoint: Checkpoint | None) -> Path:
    out = config.run.out
    if out:
        if (Path(out) / "metrics.jsonl").exists():
            raise ConfigError(f"out = {out!r}: holds a run already; go on with --resume {out}, or name another")
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    if checkpoint is not None:
        if checkpoint.path.parent.name != "checkpoints":
            raise ConfigError(f"resume = {config.run.resume!r}: is not inside a run directory; name one with --out")
        return checkpoint.path.parent.parent
    for number in itertools.count(1):
        path = Path("runs") / f"{number:03d}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise AssertionError


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Locks the file ``.lock`` of a directory. The system takes the lock from a job that dies; the file stays."""
    lock = path / ".lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path}: another job is writing to it; wait until it ends, or name another with --out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # a file system may have none
                raise
        try:
            if os.write(descriptor, bytes(_PROBE)) < _PROBE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            os.ftruncate(descriptor, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        yield
    finally:
        os.close(descriptor)
