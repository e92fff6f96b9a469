"""The record of a run, metrics.jsonl: a header line, then a line for each step."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from ..errors import UserError


def machine() -> dict[str, Any]:
    """What a figure has to be read with: processor, cores, GPU, versions."""
    from .. import __version__

    return {
        "mlpint": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Metrics:
    """Writes metrics.jsonl, one JSON object a line, each on disk when the next one is begun.

    Args:
        path: of the file; overwritten, unless ``resumed_at`` is given.
        header: the first line.
        resumed_at: go on with the file of a run that stopped: lines of later steps are dropped and the header is added.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], resumed_at: int | None = None) -> None:
        kept: list[Mapping[str, Any]] = []
        if resumed_at is not None and path.exists():
            kept = [line for line in read_lines(path) if line.get("step", 0) <= resumed_at]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in [*kept, header]), encoding="utf-8")
        partial.rename(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        self._file.close()


def settings_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value over all sections of the configuration in a header."""
    return {name: value for section in header.get("config", {}).values() for name, value in section.items()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off by the end of its run is left out.

    Raises:
        UserError: if the file cannot be read or is no metrics.jsonl.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not a JSON object") from None
    return objects
