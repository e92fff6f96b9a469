"""Results as rows of a CSV file: Liger-Kernel's schema, with the versions in columns of their own."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .timing import Timing


@dataclass(frozen=True)
class Row:
    """One timing. ``extra_benchmark_config_str`` is JSON: shape, operations, bytes, % of the roofline."""

    kernel_name: str
    kernel_provider: str
    kernel_operation_mode: str
    metric_name: str
    metric_unit: str
    x_name: str
    x_label: str
    x_value: float
    y_value_50: float
    y_value_20: float
    y_value_80: float
    extra_benchmark_config_str: str
    gpu_name: str
    timestamp: str
    torch_version: str
    triton_version: str
    mlpint_version: str
    commit: str

    @property
    def extra(self) -> dict[str, Any]:
        return json.loads(self.extra_benchmark_config_str)


@dataclass(frozen=True)
class About:
    """What every row of a run has in common."""

    gpu_name: str
    timestamp: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    torch_version: str = torch.__version__
    triton_version: str = field(default_factory=lambda: installed("triton"))
    mlpint_version: str = field(default_factory=lambda: installed("mlpint"))
    commit: str = field(default_factory=lambda: commit())

    def row(
        self, kernel: str, provider: str, mode: str, metric: str, d: int, timing: Timing, extra: Mapping[str, Any]
    ) -> Row:
        return Row(
            kernel_name=kernel,
            kernel_provider=provider,
            kernel_operation_mode=mode,
            metric_name=metric,
            metric_unit="ms",
            x_name="d",
            x_label="width (channels)",
            x_value=d,
            y_value_50=timing.p50,
            y_value_20=timing.p20,
            y_value_80=timing.p80,
            extra_benchmark_config_str=json.dumps(extra, sort_keys=True),
            **asdict(self),
        )


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """Short hash of the source tree that the package is imported from; empty where there is none."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from ..training.metrics import machine

    return machine()["processor"]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes the whole file.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def read_rows(path: Path) -> list[Row]:
    """Reads a file that :func:`write_rows` wrote.

    Raises:
        UserError: if it cannot be read or has other columns.
    """
    numbers = {f.name for f in fields(Row) if f.type == "float"}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows: Iterable[dict[str, Any]] = csv.DictReader(file)
            return [Row(**raw | {k: float(v) for k, v in raw.items() if k in numbers}) for raw in rows]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: is no file of mlpint bench ({error})") from None
