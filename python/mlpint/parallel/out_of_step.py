"""After a pass has failed on one rank, nobody knows how far the others are: the communicator refuses to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ..comm.communicator import Comm
from ..comm.guard import tell_out_of_step


class OutOfStep:
    """In the place of a communicator's transport, once the ranks are out of step: every use of it raises."""

    def __init__(self, comm: Comm, error: BaseException) -> None:
        self._message = (
            f"rank {comm.rank} cannot go on with the other ranks: an earlier pass through a LayerParallel stack failed "
            f"here ({type(error).__name__}: {error}) and the ranks are out of step since. Do not skip the batch: let "
            "the error end the job, and start again from a checkpoint"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(self._message)


@contextmanager
def in_step(comm: Comm) -> Iterator[None]:
    """Around what ranks do together: where it fails, later calls on this rank raise at once."""
    try:
        yield
    except BaseException as error:
        if comm.size > 1 and not isinstance(comm.transport, OutOfStep):
            if isinstance(error, Exception):  # a rank that exits says so itself
                with suppress(Exception):  # the error that is under way is the one to be seen
                    tell_out_of_step(comm.transport)
            transport: Any = OutOfStep(comm, error)
            comm.transport = transport
        raise
