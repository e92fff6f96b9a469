"""What is done around ``optimizer.step()``: the learning rate of coarse steps, and the term of coherence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .coherence import Coherence
from .plan import Step
from .settings import Settings


class StepHooks:
    """Hooked to the optimiser only inside phases that have something to do.

    Args:
        optimizer: the user's.
        settings: of the training.
        coherences: the terms by name of their network; empty without coherence.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Settings, coherences: dict[str, Coherence]) -> None:
        self.optimizer, self.settings, self.coherences = optimizer, settings, coherences
        self._handles: list[Any] = []

    def enter(self, step: Step) -> None:
        network, work = step.network, list[Callable[[], None]]()
        if network.name in self.coherences:
            term = self.coherences[network.name]
            work.append(lambda: term.coarse_step(step.group_step == 0))
        for child in network.children:
            if child.name in self.coherences and self._cycle_may_follow(step):
                work.append(self.coherences[child.name].parent_step)
        if work:
            self._hook(lambda *_: [act() for act in work], None)
        if step.path and self.factor(step) != 1:
            self._scale_learning_rate(self.factor(step))

    def exit(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def factor(self, step: Step) -> float:
        """Of the learning rate of a coarse step, whatever the user sets it to."""
        s = self.settings
        rewarm = s.rewarm if s.state == "reset" else 0
        return s.coarse_lr * min(1.0, (step.group_step + 1) / rewarm if rewarm else 1.0)

    def _cycle_may_follow(self, step: Step) -> bool:
        cycles = self.settings.cycles[step.network.level]
        return cycles == "auto" or step.group_step < cycles

    def _scale_learning_rate(self, factor: float) -> None:
        kept: list[Any] = []

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                kept.append(group["lr"])
                group["lr"] = group["lr"] * factor

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group, lr in zip(optimizer.param_groups, kept, strict=True):
                group["lr"] = lr
            kept.clear()

        self._hook(before, after)

    def _hook(self, before: Callable[..., Any], after: Callable[..., Any] | None) -> None:
        self._handles.append(self.optimizer.register_step_pre_hook(lambda *given: before(*given) and None))
        if after is not None:
            self._handles.append(self.optimizer.register_step_post_hook(after))
