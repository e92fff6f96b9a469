"""How good the present options are, measured on one batch: by the residual's convergence, or by the gradient itself."""

from __future__ import annotations

import dataclasses
import math

from ..mgrit.options import MGRIT
from .ladder import describe, doubled, exact, finer
from .rehearsal import Gradients, Rehearsal, compare


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


class Gauge:
    """Measures options on the batch of a rehearsal.

    Args:
        rehearsal: of the batch.
        current: the options in use.
    """

    def __init__(self, rehearsal: Rehearsal, current: MGRIT) -> None:
        self.rehearsal, self.current = rehearsal, current

    def start(self) -> Measurement:
        """The options in use. Comes first."""
        raise NotImplementedError

    def sharpen(self) -> Measurement | None:
        """The options in use, measured as exactly as can be; None where no number comes of it."""
        raise NotImplementedError

    def measure(self, options: MGRIT) -> Measurement:
        """Other options, after one of the above."""
        raise NotImplementedError

    def _gradients(self, options: MGRIT, watch: bool = False) -> Gradients:
        if options.coarse in ("scaled", "fitted") and options.coarse != self.current.coarse:
            for _ in range(2):  # an operator that is not in use may have learnt nothing, or long ago
                self.rehearsal.gradients(options, learn=True)
        return self.rehearsal.gradients(options, watch=watch)

    def _is_finite(self, gradients: Gradients) -> bool:
        cosine, _ = compare(gradients, gradients, self.rehearsal.blocks)
        return math.isfinite(cosine)


class ResidualGauge(Gauge):
    """The rule of arXiv 2601.09026, section 3.2.3: the convergence factor of the last of twice the iterations."""

    def start(self) -> Measurement:
        return self.measure(self.current)

    def sharpen(self) -> Measurement | None:
        finite = self._is_finite(self.rehearsal.gradients(exact(self.current)))
        return self.measure(self.current) if finite else None

    def measure(self, options: MGRIT) -> Measurement:
        if options.exact:
            return Measurement(options)
        more = doubled(options, self.rehearsal.blocks.depth)
        return Measurement(options, convergence_factor=self._gradients(more, watch=True).convergence_factor)


class GradientGauge(Gauge):
    """The gradient's error against that of one more iteration in both directions, or of the exact sweep.

    Where iterations converge slowly or not at all, the reference is itself wrong, and the error larger or smaller than
    measured. The convergence factors that are found on the way tell: near 1 and above, only the exact sweep can say.

    Args:
        against_exact: take the exact sweep as the reference from the start.
    """

    def __init__(self, rehearsal: Rehearsal, current: MGRIT, against_exact: bool) -> None:
        super().__init__(rehearsal, current)
        self.against_exact = against_exact
        self._own: Gradients | None = None
        self._reference: Gradients | None = None
        self._reference_options = exact(current)

    def start(self) -> Measurement:
        if self.current.exact or self.against_exact:
            return self._against_exact()
        self._own = self.rehearsal.gradients(self.current)
        self._reference_options = finer(self.current)
        self._reference = self.rehearsal.gradients(self._reference_options, watch=True)
        return self._compared(self.current, self._own, self._reference.convergence_factor)

    def sharpen(self) -> Measurement | None:
        measurement = self._against_exact()
        return measurement if self._is_finite(self._reference) else None

    def measure(self, options: MGRIT) -> Measurement:
        if options.exact:
            return Measurement(options, 1.0, 0.0)
        return self._compared(options, self._gradients(options))

    def _against_exact(self) -> Measurement:
        self._reference, self._reference_options = None, exact(self.current)
        if self._own is None:
            self._own = self.rehearsal.gradients(self.current)
        self._reference = self._own if self.current.exact else self.rehearsal.gradients(exact(self.current))
        return self._compared(self.current, self._own)

    def _compared(self, options: MGRIT, found: Gradients, factors: dict[str, float] | None = None) -> Measurement:
        agreement = compare(found, self._reference, self.rehearsal.blocks)
        reference = "" if options.exact else describe(self._reference_options)
        return Measurement(options, *agreement, factors or {}, reference)
