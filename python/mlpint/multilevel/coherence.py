"""First-order coherence (MG/OPT: Nash, Optim. Methods Softw. 14, 2000): coarse steps that descend for the fine network.

A coarse network minimises f_H(theta) - <v, theta>, with v = grad f_H(R theta) - R grad f_h(theta) where its training
begins, so that there its gradient is the fine network's, restricted. R takes the gradients of the network's own blocks,
times the ratio of the step sizes (a step that is twice as long has twice the gradient), and those outside the blocks as
they are. Both gradients are those of single batches; v is averaged over the cycles, v <- b v + (1 - b) (...), b = 0.9,
corrected for its start.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

_DECAY = 0.9


class Coherence:
    """The term of one coarse network.

    Args:
        weight: of the term in the gradient; 1 is MG/OPT's.
        ratio: of the step sizes, coarse over parent.
        own: the network's blocks' parameters.
        shared: the parameters outside the blocks.
    """

    def __init__(
        self, weight: float, ratio: float, own: Iterable[nn.Parameter], shared: Iterable[nn.Parameter]
    ) -> None:
        self.weight = weight
        self._scale = {**dict.fromkeys(own, ratio), **dict.fromkeys(shared, 1.0)}
        self.count = 0
        self.average: dict[nn.Parameter, torch.Tensor] = {}
        self.parent: dict[nn.Parameter, torch.Tensor] = {}

    def parent_step(self) -> None:
        """Before a step of the parent: its gradients."""
        self.parent = {p: p.grad * scale for p, scale in self._scale.items() if p.grad is not None}

    @torch.no_grad()
    def coarse_step(self, first: bool) -> None:
        """Before a step of the network: changes its gradients. On its first since the parent's, v is found."""
        if first and self.parent:
            self.count += 1
            for p, gradient in self.parent.items():
                if p.grad is not None:
                    v = self.average.setdefault(p, torch.zeros_like(p))
                    v.lerp_(p.grad - gradient, 1 - _DECAY)
            self.parent = {}
        for p, v in self.average.items():
            if p.grad is not None:
                p.grad.sub_(v, alpha=self.weight / (1 - _DECAY**self.count))
