"""Ranks agree on what they are about to do before any data moves.

Every collective operation of a stack (a forward pass, its backward, a state_dict) starts with each rank telling the
next one what it is about to do. A rank that does something else, with other shapes or other options, is named together
with the difference, where it would otherwise hang or mix up data. One small message a neighbour, no global
synchronisation: a rank goes on as soon as its predecessor has reached the same operation.
"""

from __future__ import annotations

import json

import torch

from .._core import USER_TAG
from ..state import State
from .communicator import Comm
from .waiting import begin_operation

_TAG = USER_TAG
_BYTES = 2048
# Gloo says only to those who wait that a message has left. One that nobody waits for would be kept for ever.
_FLUSH_EVERY = 32


def agree(comm: Comm, statement: dict[str, str]) -> None:
    """Checks a statement against that of the rank before.

    Args:
        comm: the ranks.
        statement: all that must be alike, by name; under "operation" what the rank is about to do.

    Raises:
        RuntimeError: naming both ranks and every entry that differs.
    """
    if comm.size == 1:
        return
    begin_operation(statement["operation"])
    transport = comm.transport.control
    comm.agreements += 1
    if comm.agreements % _FLUSH_EVERY == 0:  # what is under way belongs to earlier operations, which need no more of us
        comm.flush()
    message = json.dumps(statement).encode()
    if len(message) > _BYTES:
        message = json.dumps({k: v[:100] for k, v in statement.items()}).encode()[:_BYTES]
    if comm.rank + 1 < comm.size:
        padded = bytearray(message.ljust(_BYTES))
        transport.post(comm.rank + 1, _TAG, State([torch.frombuffer(padded, dtype=torch.uint8)]))
    if comm.rank > 0:
        arrived = torch.empty(_BYTES, dtype=torch.uint8, device="cpu")
        transport.receive(comm.rank - 1, _TAG, State([arrived])).wait(transport.stall_limit)
        theirs = arrived.numpy().tobytes().rstrip()
        if theirs != message:
            _raise(comm.rank, statement, json.loads(theirs))


def _raise(rank: int, ours: dict[str, str], theirs: dict[str, str]) -> None:
    names = [k for k in {**theirs, **ours} if ours.get(k) != theirs.get(k)]
    differences = "; ".join(f"{k}: {theirs.get(k)!r} on rank {rank - 1}, {ours.get(k)!r} on rank {rank}" for k in names)
    raise RuntimeError(
        f"ranks {rank - 1} and {rank} disagree: {differences}. Every rank must make the same calls with the same shapes"
    )
