"""SIGINT and SIGTERM in a training run: the step is finished and written down before all ranks end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from ..comm.communicator import Comm
from ..errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(UserError):
    """A run that a signal ended, at a step that it can go on from; no fault, but it did not do all it was asked to."""

    is_fault = False

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as a shell says it


class StopSignals:
    """Inside, the first SIGINT or SIGTERM is noted; the second does what it did before."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not take signals
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self, comm: Comm) -> int:
        """The number of a signal that a rank has had, the same on all of them; 0 if none has. Collective."""
        if comm.size == 1:
            return self.number
        # A launcher's signal reaches the ranks in different steps, and one process may be sent one alone.
        numbers = torch.zeros(comm.size, dtype=torch.float64)
        numbers[comm.rank] = self.number
        comm.sum_ordered([numbers])
        return int(numbers.max())
