"""A decision of error control, for logs and metrics."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from ..mgrit.options import MGRIT
from .ladder import short_form
from .measurement import Measurement


@dataclasses.dataclass(frozen=True)
class Decision:
    """What error control made of one step; the same on every rank but for the seconds.

    Attributes:
        step: counted from 1.
        action: ``"none"``, no check was due; ``"hold"``; ``"climb"`` or ``"descend"`` to other options; ``"raise"`` or
            ``"lower"`` where only the consistency term's weight changes; ``"skip"``.
        before, after: the options of this step and of the next one.
        consistency: the weight of the consistency term in this step and in the next one; None where control leaves it.
        reason: why, in one line.
        measured: the figures of the options in use, where there was a check.
        tried: those of other options, in the order in which they were measured.
        skip: whether loss or gradients are not finite on some rank: the optimiser must not step on any.
        seconds: the time that the check took on this rank.
    """

    step: int
    action: Literal["none", "hold", "climb", "descend", "raise", "lower", "skip"]
    before: MGRIT
    after: MGRIT
    reason: str = ""
    measured: Measurement | None = None
    tried: tuple[Measurement, ...] = ()
    skip: bool = False
    consistency: tuple[float, float] | None = None
    seconds: float = dataclasses.field(default=0.0, compare=False)

    def __str__(self) -> str:
        change = "" if self.after == self.before else f" -> {short_form(self.after)}"
        if self.consistency is not None and self.consistency[0] != self.consistency[1]:
            change += f", mu {self.consistency[0]:g} -> {self.consistency[1]:g}"
        return f"step {self.step}, {short_form(self.before)}{change}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not finite is None."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
