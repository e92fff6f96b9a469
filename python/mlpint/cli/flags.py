"""The keys of the configuration as command-line flags."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..training.config import KEYS, SECTIONS
from ..training.fields import parsed


def add_flag(parser: Any, field: dataclasses.Field[Any]) -> None:
    """Adds the flag of a key to a parser, or to a group of one."""
    flag = "--" + field.name.replace("_", "-")
    text = f"{field.metadata['help']} (default {field.default!r})".replace("%", "%%")
    if field.type == "bool":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        # Left as text here: the section says what is wrong with a value in the same words as for a TOML file.
        parser.add_argument(flag, metavar=str(field.type).upper(), help=text)


def flag_values(options: argparse.Namespace) -> dict[str, Any]:
    """Key -> value of the flags on the command line, each checked on its own."""
    values = {name: value for name, value in vars(options).items() if name in KEYS and value is not None}
    values = {name: parsed(KEYS[name], v) if isinstance(v, str) else v for name, v in values.items()}
    for section in SECTIONS.values():
        section(**{f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values})
    return values
