"""A trace of some steps on all ranks, on one clock, in the format of Chrome's and Perfetto's viewers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._core import USER_TAG
from ..comm import launchers
from ..comm.collectively import collectively
from ..comm.communicator import Comm
from ..mgrit import recorder
from ..mgrit.recorder import Event
from ..state import State

_TAG = USER_TAG + 13
_EXCHANGES = 20  # of times, of which the quickest counts
# The colours that viewers know by name.
_COLOURS = {
    "chain": "thread_state_iowait",
    "relaxation": "thread_state_running",
    "last sweep": "rail_response",
    "exact sweep": "rail_animation",
    "serial layers": "rail_load",
    "wait": "terrible",
}


@contextmanager
def trace(path: str | os.PathLike[str], comm: Any = None) -> Iterator[None]:
    """Inside, all ranks record what their stacks do; then rank 0 writes it to a file. Collective.

    ::

        with mlpint.trace("trace.json", comm):
            loss = loss_of(model(inputs)); loss.backward(); optimizer.step()

    The file is opened by ``chrome://tracing`` or ui.perfetto.dev: a row for each rank with chains (by slice),
    relaxation, last sweeps, messages sent, waits for other ranks and serial layers, each with its direction, level,
    iteration and layers. On GPUs the times are those of the calls, not of the kernels.

    Args:
        path: of the JSON file.
        comm: as for :class:`LayerParallel`.

    Raises:
        UserError: on all ranks; the file cannot be written.
        RuntimeError: a trace inside a trace.
    """
    world = Comm.of(comm).world
    offset = clock_offset(world)
    with recorder.recording() as own:
        yield
    world.barrier()
    message = json.dumps([[e.kind, e.begin + offset, e.end + offset, e.details] for e in own.events])
    everyone = [[Event(*event) for event in json.loads(text)] for text in world.gather(message.encode())]

    def write() -> None:
        if world.rank == 0:
            Path(path).write_text(json.dumps(as_chrome(everyone)), encoding="utf-8")

    collectively(world, write)


def as_chrome(ranks: list[list[Event]]) -> dict[str, Any]:
    """Events by rank in the trace-event format, microseconds from the first."""
    start = min((e.begin for events in ranks for e in events), default=0.0)
    events: list[dict[str, Any]] = []
    for rank, own in enumerate(ranks):
        events.append({"ph": "M", "pid": rank, "tid": 0, "name": "process_name", "args": {"name": f"rank {rank}"}})
        for e in sorted(own, key=lambda e: (e.begin, -e.end)):
            entry = {"pid": rank, "tid": 0, "name": e.kind, "cat": e.details.get("direction", "step")}
            entry |= {"ts": (e.begin - start) * 1e6, "args": e.details}
            instant = e.kind == "message"
            entry |= {"ph": "i", "s": "t"} if instant else {"ph": "X", "dur": (e.end - e.begin) * 1e6}
            if e.kind in _COLOURS:
                entry["cname"] = _COLOURS[e.kind]
            events.append(entry)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def clock_offset(comm: Comm) -> float:
    """What makes this rank's clock rank 0's: nothing on the same machine, whose processes read one clock; else by the
    middle of the quickest of some exchanges. Collective."""
    machines = comm.gather(launchers.this_machine())
    control, mine = comm.transport.control, 0.0
    theirs = torch.zeros(1, dtype=torch.float64, device="cpu")
    for other in (rank for rank in range(comm.size) if machines[rank] != machines[0]):
        best = float("inf")
        for _ in range(_EXCHANGES if comm.rank in (0, other) else 0):
            if comm.rank == 0:
                control.receive(other, _TAG, State([theirs])).wait(control.stall_limit)
                control.post(other, _TAG, State([torch.tensor([time.perf_counter()], dtype=torch.float64)]))
                control.flush()
                continue
            begin = time.perf_counter()
            control.post(0, _TAG, State([theirs.clone()]))
            control.flush()
            control.receive(0, _TAG, State([theirs])).wait(control.stall_limit)
            end = time.perf_counter()
            if end - begin < best:
                best, mine = end - begin, float(theirs) - (begin + end) / 2
    return mine
