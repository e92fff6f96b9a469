"""A word on stderr where a rank waits long for another: which for which, and in which operation.

A rank that skips a call, or makes one twice, leaves the others waiting until the stall limit ends the job; the word
comes sooner, once a wait, after MLPINT_WARN_AFTER seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .launchers import positive_seconds

_DEFAULT_WARN_AFTER = 30.0

_operation = "its start"


def begin_operation(name: str) -> None:
    """Says what this rank is doing from now on."""
    global _operation
    _operation = name


@contextmanager
def operation(name: str) -> Iterator[None]:
    """Says what this rank is doing within the body, or the function that this decorates."""
    before = _operation
    begin_operation(name)
    try:
        yield
    finally:
        begin_operation(before)


def warn_after() -> float:
    """Seconds of waiting after which there is a word.

    Raises:
        ValueError: MLPINT_WARN_AFTER is not a positive number.
    """
    return positive_seconds("MLPINT_WARN_AFTER", os.environ.get("MLPINT_WARN_AFTER", _DEFAULT_WARN_AFTER))


class LongWaits:
    """Those of one rank on one transport."""

    def __init__(self, rank: int) -> None:
        self._rank, self._warn_after, self._warned = rank, warn_after(), False

    def note(self, peer: int, waited: float) -> None:
        """Takes note that this rank has waited so long for a peer; called again and again in a wait, from 0 on."""
        if waited < self._warn_after:
            self._warned = False
        elif not self._warned:
            self._warned = True
            sys.stderr.write(
                f"[mlpint] rank {self._rank} has waited {waited:.0f} s for rank {peer} in {_operation}. If rank {peer} "
                "is not merely slow, it is stopped or has not made the same calls\n"
            )
            sys.stderr.flush()


class WatchedWaits:
    """The waits of one rank that are calls of a library, which takes no note of them: a thread does."""

    def __init__(self, rank: int) -> None:
        self._long_waits, self._pause = LongWaits(rank), warn_after() / 10
        self._current: tuple[int, float] | None = None  # the peer, and since when
        self._thread: threading.Thread | None = None

    @contextmanager
    def waiting_for(self, peer: int) -> Iterator[None]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="mlpint-waits", daemon=True)
            self._thread.start()
        self._current = peer, time.monotonic()
        try:
            yield
        finally:
            self._current = None

    def _watch(self) -> None:
        while True:
            time.sleep(self._pause)
            if current := self._current:
                self._long_waits.note(current[0], time.monotonic() - current[1])
