"""The options of the solver."""

from __future__ import annotations

import dataclasses
from typing import Literal

_COARSE = ("injection", "scaled", "fitted", "sum", "identity")
_RELAXATION = ("F", "FCF")


@dataclasses.dataclass(frozen=True)
class MGRIT:
    """How the layer dimension is solved: multigrid reduction in time, arXiv 2601.09026.

    Args:
        levels: number of levels; 1 is always the exact serial sweep.
        cfactor: coarsening factor, layers (points) per interval.
        forward_iters: iterations of the forward solve. Iteration 1 is the coarse solve alone, each further one a
            V-cycle; 0 is the exact serial sweep.
        backward_iters: the same for the adjoint solve.
        relaxation: ``"F"`` or ``"FCF"``.
        coarse: coarse operator, what stands for the layers of an interval: ``"injection"``, its first layer stretched
            over it; ``"scaled"`` and ``"fitted"``, the first layer times a number or a matrix learnt per interval
            (:mod:`mlpint.mgrit.learnt_operator`); ``"sum"``, all its layers from the same state, as dear as the exact
            sweep where they are on one rank, and nearly as good; ``"identity"``, nothing.
        tolerance: stop earlier, once the residual norm is at most this times the norm of the initial value. 0 never
            looks at the residual, which saves an all-reduce an iteration.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    levels: int = 2
    cfactor: int = 4
    forward_iters: int = 2
    backward_iters: int = 1
    relaxation: Literal["F", "FCF"] = "F"
    coarse: Literal["injection", "scaled", "fitted", "sum", "identity"] = "injection"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("levels", 1), ("cfactor", 2), ("forward_iters", 0), ("backward_iters", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"MGRIT.{name} = {value!r}: must be an integer of at least {least}")
        for name, allowed in (("relaxation", _RELAXATION), ("coarse", _COARSE)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"MGRIT.{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        value = self.tolerance
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"MGRIT.tolerance = {value!r}: must be a number in [0, 1)")

    def iterations(self, direction: str) -> int:
        """Iterations in a direction, "forward" or "backward"; 0 where the sweep is exact."""
        if self.levels == 1:
            return 0
        return self.forward_iters if direction == "forward" else self.backward_iters

    @property
    def exact(self) -> bool:
        """Whether both directions are exact serial sweeps."""
        return self.iterations("forward") == 0 and self.iterations("backward") == 0
