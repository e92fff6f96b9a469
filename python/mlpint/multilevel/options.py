"""The options of multilevel training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

Cycles = int | Literal["auto"]

# One coarse network is trained once; then each of its blocks takes its own place and its neighbours'.
CASCADE: dict[str, Any] = {"delta": 1.0, "neighbours": "average", "single": True, "cycles": 1}
# The same from very few blocks, whose steps may as well be as long as the others'; most of the work comes before.
GROW: dict[str, Any] = CASCADE | {"step_size": "unit", "clock": "work"}


@dataclasses.dataclass(frozen=True)
class MultilevelOptions:
    """The keyword arguments of :class:`mlpint.Multilevel`, where they are explained.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    delta: float
    coarse_steps: tuple[int, ...]  # for each level but the coarsest
    cycles: tuple[Cycles, ...]  # for each level but the coarsest
    networks: int
    levels: int
    order: Literal["AB", "BA", "alternating"]
    step_size: Literal["ode", "unit"]
    neighbours: Literal["none", "average"]
    single: bool
    state: Literal["restrict", "carry"]
    coarse_lr: float
    clock: Literal["shared", "work"]
    data: Literal["fresh", "same"]
    window: int

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            choices = (False, True) if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
            if choices and getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(map(str, choices))}")
        for name in ("networks", "levels", "window"):
            _check_integer(name, getattr(self, name), 2)
        _check_number("delta", self.delta, 0, 1)
        _check_number("coarse_lr", self.coarse_lr, 0, math.inf)
        if self.adaptive and self.clock != "shared":
            raise ValueError(
                f"clock = {self.clock!r}: its length is not known with cycles = 'auto'; give a number of cycles"
            )

    @property
    def adaptive(self) -> bool:
        """Whether the cycles end by their measured benefit."""
        return self.cycles[0] == "auto"


def by_level(name: str, value: Any, levels: int, *, least: int, deeper: int | None = None) -> tuple[Any, ...]:
    """One value for each level but the coarsest: the same if one is given, or ``deeper`` for all but the first.

    Raises:
        ValueError: naming the option; too few values or too many, or one that is no integer of at least ``least``.
    """
    _check_integer("levels", levels, 2)
    count, auto = levels - 1, name == "cycles"
    values = tuple(value) if isinstance(value, tuple | list) else (value,) + (deeper or value,) * (count - 1)
    if len(values) != count:
        raise ValueError(f"{name} = {value!r}: must be one number, or {count} for levels = {levels}")
    also = " or 'auto'" if auto else ""
    for number in values[1:] if auto and values[0] == "auto" else values:
        if type(number) is not int or number < least:
            raise ValueError(f"{name} = {value!r}: must be an integer of at least {least}{also}")
    return values


def _check_integer(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} = {value!r}: must be an integer of at least {least}")


def _check_number(name: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or math.isinf(value):
        allowed = f"in [{low}, {high}]" if math.isfinite(high) else f"of at least {low}"
        raise ValueError(f"{name} = {value!r}: must be a number {allowed}")
