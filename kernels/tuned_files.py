"""Files of tuned launch configurations, one a device: JSON that ``mlpint tune`` writes and :mod:`dispatch` reads.

``{"format": 1, "device": name, "capability": [major, minor], "versions": {...}, "entries": [...]}``, an entry being
``{"op", "d", "m", "j", "dtype", "path": "torch"|"triton", "config": {...}|null, "microseconds": {"torch": ...}}``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UserError

FORMAT = 1
VARIABLE = "MLPINT_TUNED"
SHIPPED = Path(__file__).parent / "tuned"
# An entry serves shapes within these factors of its own: rows are M x J, all that a launch works on.
LIMITS = {"d": 1.5, "rows": 4.0, "j": 4.0}
# Width decides more about tiles and about torch's own speed than the number of rows does.
_WEIGHTS = {"d": 3.0, "rows": 1.0, "j": 0.5}
_FIELDS = {"op": str, "d": int, "m": int, "j": int, "dtype": str, "path": str}


class TunedFileError(UserError, ValueError):
    """A file of tuned configurations that cannot be used; names the file and the remedy."""


@dataclass(frozen=True)
class Entry:
    """What was found best for one operation and shape.

    Attributes:
        op: name of the operation.
        d, m, j: width, rows of one layer, independent layers in one launch.
        dtype: torch's name of it, e.g. ``"bfloat16"``.
        path: ``"torch"`` or ``"triton"``.
        config: launch configuration of the kernel; None where the path is torch.
        microseconds: medians measured, by path.
    """

    op: str
    d: int
    m: int
    j: int
    dtype: str
    path: str
    config: Mapping[str, int] | None
    microseconds: Mapping[str, float]

    def factors(self, d: int, m: int, j: int) -> dict[str, float]:
        """How far a shape is from this entry's, each at least 1; no rows or layers count as one."""
        d, m, j = max(d, 1), max(m, 1), max(j, 1)
        pairs = {"d": (d, self.d), "rows": (m * j, self.m * self.j), "j": (j, self.j)}
        return {name: max(a / b, b / a) for name, (a, b) in pairs.items()}

    def distance(self, d: int, m: int, j: int) -> float:
        """Weighted distance in log space; infinite beyond the limits."""
        factors = self.factors(d, m, j)
        if any(factors[name] > limit for name, limit in LIMITS.items()):
            return math.inf
        return sum(weight * math.log2(factors[name]) for name, weight in _WEIGHTS.items())

    def __str__(self) -> str:
        return f"{self.op} d {self.d} M {self.m} J {self.j} {self.dtype}"


@dataclass(frozen=True)
class Tuned:
    """A file of entries.

    Attributes:
        path: where the file lies.
        device, capability: the GPU it was made on and that GPU's compute capability.
        entries: the entries by (op, dtype).
        estimated: whether nothing was measured on such a GPU; see :mod:`.estimate`.
    """

    path: Path
    device: str
    capability: tuple[int, int]
    entries: Mapping[tuple[str, str], tuple[Entry, ...]]
    estimated: bool = False

    def nearest(self, op: str, d: int, m: int, j: int, dtype: str) -> Entry | None:
        """The entry nearest in log space; None if none lies within the limits."""
        entries = self.entries.get((op, dtype), ())
        best = min(entries, key=lambda e: e.distance(d, m, j), default=None)
        return best if best is not None and math.isfinite(best.distance(d, m, j)) else None


def slug(device: str) -> str:
    """A device's name as a file name: ``"NVIDIA H200"`` -> ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def user_file(device: str) -> Path:
    """Where ``mlpint tune`` writes and dispatch looks first, unless MLPINT_TUNED names another file."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mlpint" / f"{slug(device)}.json"


def files_for(device: str, capability: tuple[int, int]) -> list[Tuned]:
    """The files that hold for a device: the user's, then those shipped, the device's own before its architecture's, and
    estimated ones last.

    Raises:
        TunedFileError: a file is broken, or MLPINT_TUNED names one that is missing or of another architecture.
    """
    user = user_file(device)
    own = []
    if user.is_file() or os.environ.get(VARIABLE):
        own.append(load(user))
        if own[0].capability != capability:
            raise TunedFileError(
                f"{user}: tuned on {own[0].device} (sm_{_sm(own[0].capability)}), but this is {device} "
                f"(sm_{_sm(capability)}); run 'mlpint tune' here or unset {VARIABLE}"
            )
    shipped = [load(path) for path in sorted(SHIPPED.glob("*.json"))] if SHIPPED.is_dir() else []
    alike = [t for t in shipped if t.capability == capability]
    return own + sorted(alike, key=lambda t: (t.estimated, t.device != device))


def _sm(capability: tuple[int, int]) -> str:
    return "".join(map(str, capability))


def load(path: Path) -> Tuned:
    """Reads a file.

    Raises:
        TunedFileError: naming the file, what is wrong with it and the remedy.
    """
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        raise TunedFileError(
            f"{path}: cannot be read ({error.strerror}); run 'mlpint tune' or unset {VARIABLE}"
        ) from None
    return _load(path, stamp)


@lru_cache(maxsize=32)
def _load(path: Path, stamp: int) -> Tuned:
    def broken(what: str) -> TunedFileError:
        return TunedFileError(f"{path}: {what}; delete it and run 'mlpint tune' to make it anew")

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise broken(f"is no JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else None
        raise broken(f"has format {got!r}, and this version reads {FORMAT}")
    entries: dict[tuple[str, str], list[Entry]] = {}
    try:
        for number, raw in enumerate(data["entries"]):
            entry = _entry(raw)
            if entry is None:
                raise broken(f"entry {number} is no tuned configuration: {raw!r}")
            entries.setdefault((entry.op, entry.dtype), []).append(entry)
        major, minor = map(int, data["capability"])
        device = str(data["device"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, TunedFileError):
            raise
        raise broken(f"lacks what it must hold ({type(error).__name__}: {error})") from None
    by_key = {key: tuple(of_key) for key, of_key in entries.items()}
    return Tuned(path, device, (major, minor), by_key, data.get("estimated") is True)


def _entry(raw: Any) -> Entry | None:
    """The entry, or None if it is not one."""
    if not isinstance(raw, dict) or any(type(raw.get(name)) is not kind for name, kind in _FIELDS.items()):
        return None
    config, times = raw.get("config"), raw.get("microseconds", {})
    right = raw["path"] in ("torch", "triton") and min(raw["d"], raw["m"], raw["j"]) > 0 and isinstance(times, dict)
    if raw["path"] == "triton":
        right = right and isinstance(config, dict) and all(type(v) in (int, bool) for v in config.values())
    return Entry(**{name: raw[name] for name in _FIELDS}, config=config, microseconds=times) if right else None


def write(
    path: Path, device: str, capability: tuple[int, int], about: Mapping[str, Any], entries: Iterable[Entry]
) -> None:
    """Writes a file at once or not at all; ``about`` holds versions, date and commit."""
    data = {
        "format": FORMAT,
        "device": device,
        "capability": list(capability),
        **about,
        "entries": [dict(vars(entry)) for entry in entries],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
