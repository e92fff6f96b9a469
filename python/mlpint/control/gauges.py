"""How good the present options are, measured on one batch: by the residual's convergence, or by the gradient itself."""

from __future__ import annotations

import functools
import math

from ..mgrit.options import MGRIT
from .ladder import doubled_options, exact_options, finer_options, short_form
from .measurement import Measurement
from .policy import Request
from .rehearsal import Gradients, Rehearsal, gradient_agreement


class Gauge:
    """Measures options on the batch of a rehearsal.

    Args:
        rehearsal: repeats the step's passes.
        current: the options in use.
    """

    def __init__(self, rehearsal: Rehearsal, current: MGRIT) -> None:
        self.rehearsal, self.current = rehearsal, current

    def answer(self, request: Request) -> Measurement | None:
        """Measures what a check asks for. Collective."""
        if request.kind == "measure":
            return self.measure(request.options)
        return self.start() if request.kind == "start" else self.sharpen()

    def start(self) -> Measurement:
        """Measures the options in use against the usual reference."""
        raise NotImplementedError

    def sharpen(self) -> Measurement | None:
        """Measures the options in use as exactly as can be; None where the exact sweep is not finite."""
        raise NotImplementedError

    def measure(self, options: MGRIT) -> Measurement:
        """Measures other options, after one of the above."""
        raise NotImplementedError

    def _gradients(self, options: MGRIT, watch: bool = False) -> Gradients:
        if options.coarse in ("scaled", "fitted") and options.coarse != self.current.coarse:
            for _ in range(2):  # an operator that is not in use may have learnt nothing, or long ago
                self.rehearsal.gradients(options, learn=True)
        return self.rehearsal.gradients(options, watch=watch)

    def _is_finite(self, gradients: Gradients) -> bool:
        cosine, _ = gradient_agreement(gradients, gradients, self.rehearsal.blocks)
        return math.isfinite(cosine)


class ResidualGauge(Gauge):
    """The rule of arXiv 2601.09026, section 3.2.3: the convergence factor of the last of twice the iterations."""

    def start(self) -> Measurement:
        return self.measure(self.current)

    def sharpen(self) -> Measurement | None:
        finite = self._is_finite(self.rehearsal.gradients(exact_options(self.current)))
        return self.measure(self.current) if finite else None

    def measure(self, options: MGRIT) -> Measurement:
        if options.exact:
            return Measurement(options)
        more = doubled_options(options, self.rehearsal.blocks.layout.depth)
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
        self._reference: Gradients | None = None
        self._reference_options = exact_options(current)

    @functools.cached_property
    def _own(self) -> Gradients:
        return self.rehearsal.gradients(self.current)

    def start(self) -> Measurement:
        own, factors = self._own, {}
        if self.current.exact or self.against_exact:
            self._exact_reference()
        else:
            self._reference_options = finer_options(self.current)
            self._reference = self.rehearsal.gradients(self._reference_options, watch=True)
            factors = self._reference.convergence_factor
        return self._against_reference(self.current, own, factors)

    def sharpen(self) -> Measurement | None:
        own, reference = self._own, self._exact_reference()
        measurement = self._against_reference(self.current, own)
        return measurement if self._is_finite(reference) else None

    def measure(self, options: MGRIT) -> Measurement:
        if options.exact:
            return Measurement(options, 1.0, 0.0)
        return self._against_reference(options, self._gradients(options))

    def _exact_reference(self) -> Gradients:
        self._reference = None  # its memory is free before the next one takes some
        self._reference_options = exact_options(self.current)
        self._reference = self._own if self.current.exact else self.rehearsal.gradients(self._reference_options)
        return self._reference

    def _against_reference(
        self, options: MGRIT, gradients: Gradients, factors: dict[str, float] | None = None
    ) -> Measurement:
        assert self._reference is not None, "measure comes after start or sharpen"
        agreement = gradient_agreement(gradients, self._reference, self.rehearsal.blocks)
        reference = "" if options.exact else short_form(self._reference_options)
        return Measurement(options, *agreement, factors or {}, reference)
