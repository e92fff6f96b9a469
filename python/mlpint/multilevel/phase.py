"""One optimiser step of one network of the hierarchy."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

import torch

from .schedule import Step


class Phase:
    """A context manager: inside it the blocks run as one network of the hierarchy, with its weights.

    Attributes:
        name: ``"fine"``, ``"A"``, ``"B"``, ...; ``"AA"``, ``"AB"``, ... on a deeper level.
        level: 0 for the fine network.
        layers: indices of the layers that run.
        fine_step: fine steps before this one; of a coarse step, before the fine step whose cycle it belongs to.
        batch_index: which batch the step is meant for. Steps that are to see the same data have the same.
        clock, clock_steps: where a schedule of the learning rate stands, and its length: see ``clock`` of
            :class:`Multilevel`.
        seconds: what the step took, once it is done.
    """

    def __init__(
        self, step: Step, clock: int, clock_steps: int, running: Callable[[Phase], AbstractContextManager[None]]
    ) -> None:
        self.step = step
        self.name, self.level, self.layers = step.network.name, step.network.level, step.network.layers
        self.fine_step, self.batch_index = step.fine_step, step.batch
        self.clock, self.clock_steps = clock, clock_steps
        self.entered = False
        self.seconds = 0.0
        self.step_loss: float | torch.Tensor | None = None
        self._running = running
        self._started = 0.0

    @property
    def fine(self) -> bool:
        """Whether this is a step of the whole network."""
        return self.level == 0

    def loss(self, value: torch.Tensor | float) -> None:
        """Tells the step's loss, which ``cycles="auto"`` goes by; NaN for a step that was skipped.

        A loss that is not finite is not compared with others, and no cycle follows its step.
        """
        self.step_loss = value.detach() if isinstance(value, torch.Tensor) else float(value)

    def __enter__(self) -> Phase:
        context = self._running(self)
        context.__enter__()
        self._context = context
        self.entered, self._started = True, time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        self._context.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        return f"Phase({self.name!r}, fine_step={self.fine_step}, batch_index={self.batch_index})"
