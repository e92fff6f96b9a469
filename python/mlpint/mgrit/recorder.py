"""What this rank does, as events on a clock, for traces. Nothing is recorded but while a recorder is active."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .. import _core


class Event(NamedTuple):
    """begin, end: seconds of ``time.perf_counter``; kind: relaxation, chain, last sweep, exact sweep, wait, ..."""

    kind: str
    begin: float
    end: float
    details: dict[str, Any]


class Recorder:
    """Attributes:
    events: in the order in which they ended.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._solver: Any = None
        self._direction = ""

    @contextmanager
    def solve(self, solver: Any, direction: str) -> Iterator[None]:
        """Around a solve, whose evaluations are its phases'."""
        self._solver, self._direction = solver, direction
        try:
            yield
        finally:
            self._solver = None

    @contextmanager
    def evaluation(self, layers: list[int], level: int, direction: str, slice_index: int) -> Iterator[None]:
        """Around evaluations of layers that the solver, or a serial edge, asks for."""
        begin = time.perf_counter()
        yield
        kind = "serial layers"
        details: dict[str, Any] = {"direction": direction, "layers": layers}
        if self._solver is not None:
            kind = _KINDS.get(self._solver.where[0], self._solver.where[0])
            details |= {"level": level, "iteration": self._solver.iteration}
        if slice_index >= 0:
            details["slice"] = slice_index
        self.events.append(Event(kind, begin, time.perf_counter(), details))

    def exchanges(self, result: Any, direction: str) -> None:
        """The waits and messages of a solve that is over."""
        for at, to, operation, level, iteration in result.sent:
            details = {"direction": direction, "in": _KINDS.get(operation, operation), "to": to}
            self.events.append(Event("message", at, at, details | {"level": level, "iteration": iteration}))
        for begin, end, operation, level, iteration in result.waits:
            details = {"direction": direction, "in": _KINDS.get(operation, operation)}
            self.events.append(Event("wait", begin, end, details | {"level": level, "iteration": iteration}))

    @contextmanager
    def span(self, kind: str, **details: Any) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.events.append(Event(kind, begin, time.perf_counter(), details))


# What the solver is at, by the names that the parts of a step go by.
_KINDS = {
    "coarsest sweep": "chain",
    "F-relaxation": "relaxation",
    "FCF-relaxation": "relaxation",
    "prolongation": "relaxation",
}

active: Recorder | None = None


@contextmanager
def recording() -> Iterator[Recorder]:
    """Inside, what this rank does is recorded."""
    global active
    if active is not None:
        raise RuntimeError("a trace is being recorded already")
    active = Recorder()
    _core.note_waits(True)
    try:
        yield active
    finally:
        active = None
        _core.note_waits(False)


@contextmanager
def span(kind: str, **details: Any) -> Iterator[None]:
    """Records the body, where a recorder is active."""
    if active is None:
        yield
        return
    with active.span(kind, **details):
        yield
