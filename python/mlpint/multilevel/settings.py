"""The options of multilevel training."""

from __future__ import annotations

import dataclasses
import math

ORDERS = ("AB", "BA", "alternating")
STEP_SIZES = ("ode", "unit")
NEIGHBOURS = ("none", "average", "correction")
STATES = ("carry", "restrict", "separate", "reset")
CLOCKS = ("shared", "own", "work")
DATA = ("fresh", "same")


@dataclasses.dataclass(frozen=True)
class Settings:
    """See :class:`mlpint.Multilevel`, whose keyword arguments these are.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    delta: float = 0.25
    coarse_steps: int | tuple[int, ...] = 100
    cycles: int | str | tuple[int | str, ...] = 35
    networks: int = 2
    levels: int = 2
    order: str = "AB"
    step_size: str = "ode"
    neighbours: str = "none"
    single: bool = False
    state: str = "restrict"
    rewarm: int = 10
    coherence: float = 0.0
    coarse_lr: float = 1.0
    clock: str = "shared"
    data: str = "fresh"
    window: int = 5

    def __post_init__(self) -> None:
        for name, least in (("networks", 2), ("levels", 2), ("rewarm", 0), ("window", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} = {value!r}: must be an integer of at least {least}")
        choices = {
            "order": ORDERS,
            "step_size": STEP_SIZES,
            "neighbours": NEIGHBOURS,
            "state": STATES,
            "clock": CLOCKS,
            "data": DATA,
            "single": (False, True),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(map(str, allowed))}")
        _check_number("delta", self.delta, 0, 1)
        _check_number("coherence", self.coherence, 0, 1)
        _check_number("coarse_lr", self.coarse_lr, 0, math.inf)
        object.__setattr__(self, "coarse_steps", self._by_level("coarse_steps", 1, None))
        object.__setattr__(self, "cycles", self._by_level("cycles", 0, 1))
        if self.adaptive and self.clock != "shared":
            raise ValueError(
                f"clock = {self.clock!r}: its length is not known with cycles = 'auto'; give a number of cycles"
            )

    @property
    def adaptive(self) -> bool:
        """Whether cycles end by the measured benefit."""
        return self.cycles[0] == "auto"

    def _by_level(self, name: str, least: int, deeper: int | None) -> tuple:
        """One value for each level but the coarsest; ``deeper`` (or the same) for all but the first if one is given."""
        value, count = getattr(self, name), self.levels - 1
        values = tuple(value) if isinstance(value, tuple | list) else None
        if values is None:
            values = (value, *[value if deeper is None else deeper] * (count - 1))
        if len(values) != count:
            raise ValueError(f"{name} = {value!r}: must be one number, or {count} for levels = {self.levels}")
        for i, number in enumerate(values):
            if name == "cycles" and i == 0 and number == "auto":
                continue
            if type(number) is not int or number < least:
                also = " or 'auto'" if name == "cycles" else ""
                raise ValueError(f"{name} = {value!r}: must be an integer of at least {least}{also}")
        return values


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or math.isinf(value):
        allowed = f"in [{low}, {high}]" if math.isfinite(high) else f"of at least {low}"
        raise ValueError(f"{name} = {value!r}: must be a number {allowed}")
