"""What a solve cost and how it went."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict

import torch

KINDS = ("forward", "input_vjp", "parameter_vjp", "combined_vjp")


@dataclasses.dataclass
class Stats:
    """Of the last forward pass and its backward, on this rank.

    Attributes:
        iterations: done, by direction (``"forward"``, ``"backward"``); 0 for the exact sweep.
        residual_norms: after iteration 1, 2, ..., by direction, over all ranks; where they were computed.
        evaluations: ``evaluations[kind][level]`` layers evaluated; the kinds are ``forward``, ``input_vjp``,
            ``parameter_vjp`` (the weight part alone) and ``combined_vjp`` (input and weights in one).
        inconsistency: with a consistency term ||e_K||^2 and ||end - u_K||^2 of each own interval, by its first layer:
            scalar tensors. What the last adjoint norm in ``residual_norms`` is of then has the term in it.
        slices: of the batch, that chains (or exact sweeps) went through the ranks in.
        seconds: by phase: ``forward`` and ``backward`` in all, and within them ``wait`` for other ranks.
    """

    iterations: dict[str, int] = dataclasses.field(default_factory=dict)
    residual_norms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    evaluations: dict[str, Counter[int]] = dataclasses.field(default_factory=lambda: {k: Counter() for k in KINDS})
    inconsistency: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    slices: int = 1
    seconds: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    def total(self, kind: str) -> int:
        """Evaluations of a kind over all levels."""
        return self.evaluations[kind].total()

    @property
    def relative_errors(self) -> dict[int, float]:
        """||e_K|| / ||end - u_K|| of the coarse model, by the first layer of each own interval."""
        if not self.inconsistency:
            return {}
        squares = torch.stack([torch.stack(pair) for pair in self.inconsistency.values()]).tolist()  # waits once
        ratios = (math.sqrt(e / d) if d > 0 else 0.0 for e, d in squares)
        return dict(zip(self.inconsistency, ratios, strict=True))

    @property
    def convergence_factor(self) -> dict[str, float]:
        """Ratio of the last two residual norms, by direction; where there are two."""
        return {d: r[-1] / r[-2] for d, r in self.residual_norms.items() if len(r) > 1 and r[-2] > 0}
