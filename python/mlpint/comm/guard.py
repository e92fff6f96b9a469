"""One rank's failure ends all ranks, and a rank that leaves early is noticed by those that wait for it.

An mpirun takes no notice of a rank that ends with an exception while the others wait for it, and torchrun none of one
that leaves with exit code 0. So with several ranks `install` has

- an uncaught exception print its traceback with the rank in front of every line, and end the job at once;
- a rank that comes to the end of its script (or to sys.exit, or to os._exit(0), at which MPICH's mpirun would kill the
  others and report success) tell the others and wait for them. A rank that waits for one that has left raises an error
  that names it. When all have left, all end as they would have, without delay.

A killed process is noticed by the launcher, a stopped one by the stall limit on every wait.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, Protocol

from .. import _core
from .waiting import LongWaits

_LAST_WORDS = 0.2  # seconds for the launcher to read what was written: an aborted mpirun may drop it
_GRACE = 1.0  # seconds a message sent before its sender left may still take


class Group(Protocol):
    """Ranks that leave together."""

    rank: int

    def announce(self) -> None:
        """Tells the other ranks that this one is leaving."""

    def see_off(self) -> None:
        """Waits for the other ranks to leave too; raises if they do not."""

    def abort(self) -> NoReturn:
        """Ends every rank with a non-zero exit code."""


_groups: list[Group] = []
_process = 0  # the one that the hooks are for: a forked child leaves on its own
_exit_at_once = os._exit


def install(group: Group) -> None:
    """Puts the hooks in place, once, and makes them serve this group as well."""
    global _process
    if not _groups:
        _process = os.getpid()
        previous = sys.excepthook
        sys.excepthook = lambda *error: _fail(*error) if os.getpid() == _process else previous(*error)
        # The last one registered runs first: before mpi4py finalises MPI.
        atexit.register(_leave)
        os._exit = _leave_and_exit
    _groups.append(group)


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with a message where the body takes longer: for the start of a library, which has no such limit.

    MPI's start holds Python's lock while it waits for ranks that may have failed before they came that far: then there
    is only a traceback, a moment later.
    """

    def expire() -> None:
        sys.stderr.write(f"{message}\n")
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        _exit_at_once(1)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + 1, exit=True, file=2)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def tell_out_of_step(transport: object) -> None:
    """Tells the ranks at the other ends of a transport that this one will send them nothing any more."""
    for group in _groups:
        if isinstance(group, MpiGroup) and group.serves(transport):
            group.tell_out_of_step()


def _fail(kind, error, trace) -> NoReturn:
    _end(traceback.format_exception(kind, error, trace))


def _end(lines: list[str]) -> NoReturn:
    with suppress(Exception):
        sys.stdout.flush()
    rank = f"[rank {_groups[0].rank}] "
    with suppress(Exception):  # nothing may keep the job from ending
        sys.stderr.write("".join(f"{rank}{line}\n" for line in "".join(lines).rstrip("\n").split("\n")))
        sys.stderr.flush()
    _groups[0].abort()


def _leave_and_exit(status: int) -> NoReturn:
    if status == 0:  # any other code ends all ranks
        _leave()
    _exit_at_once(status)


def _leave() -> None:
    global _process
    if os.getpid() != _process:
        return
    _process = 0  # this happens once
    try:
        for group in _groups:
            group.announce()
        for group in _groups:
            group.see_off()
    except BaseException as error:
        _end(traceback.format_exception(error))


def _poll(done: Callable[[], bool], seconds: float) -> bool:
    limit, pause = time.monotonic() + seconds, 1e-4
    while not done():
        if time.monotonic() > limit:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return True


class MpiGroup:
    """The ranks of an mpi4py communicator.

    Args:
        communicator: one that carries nothing else.
        transport: the transport between these ranks, whose waits are watched.
    """

    def __init__(self, communicator, transport: _core.Transport) -> None:
        from mpi4py import MPI

        self._mpi, self._communicator, self._transport = MPI, communicator, transport
        self.rank, self._size = communicator.rank, communicator.size
        self._left: dict[int, float] = {}  # when it was seen to have left
        self._failed: dict[int, float] = {}  # when it was heard that it is out of step
        self._goodbyes: list = []
        self._long_waits = LongWaits(self.rank)
        transport.set_watch(self._watch)

    def announce(self) -> None:
        if self._mpi.Is_finalized():
            return
        for r in range(self._size):
            if r != self.rank:
                self._goodbyes.append(self._communicator.Isend([b"", 0, self._mpi.BYTE], r))

    def serves(self, transport: object) -> bool:
        return transport is self._transport

    def tell_out_of_step(self) -> None:
        if not self._mpi.Is_finalized():
            others = (r for r in range(self._size) if r != self.rank)
            self._goodbyes += [self._communicator.Isend([b"!", 1, self._mpi.BYTE], r) for r in others]

    def see_off(self) -> None:
        limit = self._transport.stall_limit
        if not self._mpi.Is_finalized() and not _poll(self._all_left, limit):
            absent = [str(r) for r in range(self._size) if r != self.rank and r not in self._left]
            raise _core.TransferError(
                f"rank {self.rank} came to the end of its script and waited {limit:.0f} s for rank "
                f"{', '.join(absent)} to do the same; that rank is stopped, hung or out of step"
            )

    def _all_left(self) -> bool:
        self._transport.progress()
        self._listen()
        return len(self._left) == self._size - 1 and all(g.Test() for g in self._goodbyes)

    def abort(self) -> NoReturn:
        time.sleep(_LAST_WORDS)
        if not self._mpi.Is_finalized():
            self._mpi.COMM_WORLD.Abort(1)
        _exit_at_once(1)

    def _listen(self) -> None:
        status = self._mpi.Status()
        while self._communicator.Iprobe(status=status):
            failed = status.Get_count(self._mpi.BYTE)
            self._communicator.Recv([bytearray(1), failed, self._mpi.BYTE], status.source)
            (self._failed if failed else self._left)[status.source] = time.monotonic()

    def _watch(self, peer: int, waited: float) -> None:
        self._long_waits.note(peer, waited)
        self._listen()
        if time.monotonic() - self._failed.get(peer, time.monotonic()) > _GRACE:
            raise _core.TransferError(
                f"rank {self.rank} waits for rank {peer}, where a pass through a LayerParallel stack has failed: the "
                "ranks are out of step. Where that error is swallowed, let it end the job instead"
            )
        if time.monotonic() - self._left.get(peer, time.monotonic()) > _GRACE:
            raise _core.TransferError(
                f"rank {self.rank} waits for rank {peer}, which has left: it came to the end of its script or called "
                "sys.exit or os._exit. Every rank must make the same calls"
            )


class TorchGroup:
    """The ranks of a torch.distributed group, where a lost connection shows who has left.

    Args:
        store: the one the ranks met at, if it is known.
    """

    def __init__(self, rank: int, size: int, store) -> None:
        self.rank, self._size, self._store = rank, size, store

    def announce(self) -> None:
        self._left(1)

    def see_off(self) -> None:
        # Whoever leaves closes its connections, and so stays a while for what is on its way to it.
        _poll(lambda: self._left(0) >= self._size, _GRACE)

    def _left(self, more: int) -> int:
        try:
            return self._store.add("mlpint/left", more) if self._store else self._size
        except RuntimeError:  # the store has gone with the rank that served it
            return self._size

    def abort(self) -> NoReturn:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _kill_stopped_workers()
        _exit_at_once(1)


def _kill_stopped_workers() -> None:
    """Torchrun ends its workers with SIGTERM, which does not reach one that is stopped, and then waits 30 seconds."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if state == "T" and int(parent) == os.getppid():
                os.kill(int(status.parent.name), signal.SIGKILL)
