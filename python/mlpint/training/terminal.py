"""Whether what is printed ends up on a terminal, also where a launcher stands between."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TextIO

_LAUNCHERS = ("mpirun", "mpiexec", "hydra", "prte", "orted", "srun", "torchrun")


def terminal_of_launcher(out: TextIO, errors: TextIO) -> int | None:
    """The columns of the terminal that both streams are shown on; None where they are not.

    Launchers hand the streams of their ranks on through pipes; then it is asked what the launcher's own are.
    """
    if out.isatty() and errors.isatty():
        return shutil.get_terminal_size().columns
    for process in _launchers(os.getppid()):
        found = [_device(process, number) for number in (1, 2)]
        if found[0] is not None and found[0] == found[1]:
            with open(found[0], "rb", buffering=0) as terminal:
                return os.get_terminal_size(terminal.fileno()).columns or 80
    return None


def _launchers(process: int) -> list[int]:
    """A process and those it descends from, as far as they are launchers'."""
    found: list[int] = []
    while process > 1 and len(found) < 5:
        try:
            name = Path(f"/proc/{process}/comm").read_text()
            parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        if not name.startswith(_LAUNCHERS):
            break
        found.append(process)
        process = parent
    return found


def _device(process: int, stream: int) -> str | None:
    try:
        device = os.readlink(f"/proc/{process}/fd/{stream}")
    except OSError:
        return None
    return device if device.startswith(("/dev/pts/", "/dev/tty")) else None
