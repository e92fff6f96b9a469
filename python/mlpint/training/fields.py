"""Configuration keys that know their help and their limits, and sections of them that check themselves."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError

_LARGEST = 2**31  # no integer may be as large, unless its limits say so


def key(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its help and its limits: ``least``, ``above``, ``below``, ``most`` or ``choices``."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of keys, each of type int, float, bool or str.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))


def parsed(field: dataclasses.Field[Any], text: str) -> Any:
    """The value that a flag's text stands for; text that is no number is left for the section to refuse."""
    try:
        return {"int": int, "float": float}.get(str(field.type), str)(text)
    except ValueError:
        return text


def similar(name: str, names: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest of the known ones, or all of them."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(names)}"


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    kind, limits = str(field.type), field.metadata
    if kind == "float" and type(value) is int and abs(value) < _LARGEST:
        value = float(value)
    right = type(value).__name__ == kind
    if right and kind == "str":
        right = "\0" not in value and all(len(part) < 256 for part in os.fsencode(value).split(b"/"))
    if right and kind in ("int", "float"):
        right = math.isfinite(value) if kind == "float" else abs(value) < limits.get("below", _LARGEST)
        right = right and value >= limits.get("least", -math.inf) and value > limits.get("above", -math.inf)
        right = right and value <= limits.get("most", math.inf) and value < limits.get("below", math.inf)
    if not right or value not in limits.get("choices", (value,)):
        raise ConfigError(f"{field.name} = {value!r}: must be {_allowed(kind, limits)}")
    return value


def _allowed(kind: str, limits: Mapping[str, Any]) -> str:
    if "choices" in limits:
        return "one of " + ", ".join(limits["choices"])
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    bounds = " and ".join(f"{word} {limits[name]}" for name, word in words.items() if name in limits)
    noun = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}[kind]
    return f"{noun} {bounds}".strip()
