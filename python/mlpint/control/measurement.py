"""The figures of one set of options on one batch."""

from __future__ import annotations

import dataclasses
import math

from ..mgrit.options import MGRIT


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What some options gave on one batch; the same on every rank.

    Attributes:
        options: measured.
        cosine: of their gradient with the reference gradient, over the stack's parameters.
        error: ||g - g_ref|| / ||g_ref||.
        convergence_factor: of the residual in the last iteration, ||r^(k+1)|| / ||r^(k)||, by direction.
        reference: the options of the reference gradient, in short; empty where there is none or it is the same.
    """

    options: MGRIT
    cosine: float | None = None
    error: float | None = None
    convergence_factor: dict[str, float] = dataclasses.field(default_factory=dict)
    reference: str = ""

    @property
    def largest_factor(self) -> float:
        """Of both directions; 0 where there is nothing to iterate. Not a number counts as infinite."""
        return max((math.inf if math.isnan(f) else f for f in self.convergence_factor.values()), default=0.0)

    def __str__(self) -> str:
        factors = ", ".join(f"rho {d} {f:.3g}" for d, f in self.convergence_factor.items())
        if self.cosine is None:
            return factors or "nothing to iterate"
        against = f" against {'the exact sweep' if self.reference == 'exact' else self.reference}"
        agreement = f"gradient cosine {self.cosine:.4f}, error {self.error:.3g}" + (against if self.reference else "")
        return agreement + (f", {factors}" if factors else "")
