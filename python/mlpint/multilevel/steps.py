"""What is done around ``optimizer.step()`` of a coarse network."""

from __future__ import annotations

from typing import Any

import torch

from .plan import Step
from .settings import Settings


class StepHooks:
    """Scales the learning rate for the length of a step, whatever the user sets it to.

    Hooked to the optimiser only while a coarse network is trained, and only if there is something to do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
        self.optimizer, self.settings = optimizer, settings
        self._handles: list[Any] = []

    def factor(self, step: Step) -> float:
        """Of the learning rate."""
        s = self.settings
        rewarm = s.rewarm if s.state == "reset" else 0
        return s.coarse_lr * min(1.0, (step.group_step + 1) / rewarm if rewarm else 1.0)

    def enter(self, step: Step) -> None:
        factor, kept = self.factor(step), []
        if factor == 1:
            return

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                kept.append(group["lr"])
                group["lr"] = group["lr"] * factor

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group, lr in zip(optimizer.param_groups, kept, strict=True):
                group["lr"] = lr
            kept.clear()

        self._handles = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]

    def exit(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
