"""Which path a shape takes: the Triton kernel where a tuned entry near it says that it is faster, else plain PyTorch.

The torch path is always there and always the fallback. Importing this module imports no Triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from . import tuned_files

# These operations are dispatched, each on its own.
OPERATIONS = (
    "ln_linear",
    "linear_axpy",
    "mlp",
    "attention",
    "attention_backward",
    "ln_backward_add",
    "gated_linear",
    "gated_backward",
    "pack_heads",
    "average",
)
WIDEST_HEAD = 128  # channels of a head that attention's kernels can hold
WIDEST = {"mlp": 256}  # channels that a kernel can hold, where that is bounded
OLDEST = (8, 0)  # compute capability of the oldest GPUs the kernels are compiled and checked for


@dataclass(frozen=True)
class Choice:
    """The path of one operation.

    Attributes:
        path: ``"torch"`` or ``"triton"``.
        config: launch configuration for the Triton kernel; None where the path is torch, or to use its default.
        why: the reason, for people.
    """

    path: str
    config: Mapping[str, int] | None
    why: str


_forced: dict[str, Choice] = {}


def choose(op: str, *, d: int, m: int, j: int, dtype: torch.dtype, device: torch.device | str) -> Choice:
    """The path that an operation takes.

    Args:
        op: name of the operation, e.g. ``"ln_linear"``.
        d: width of its input, in channels.
        m: rows of one layer (batch x sequence).
        j: independent layers in the launch.
        dtype: of the activations.
        device: of the tensors.

    Raises:
        TunedFileError: the file of tuned configurations is broken or of another architecture.
    """
    if d > WIDEST.get(op, d):
        return Choice("torch", None, f"the kernel holds rows of at most {WIDEST[op]} channels, not {d}")
    if op in _forced:
        return _forced[op]
    device = torch.device(device)
    why_not = _unusable(device)
    if why_not:
        return Choice("torch", None, why_not)
    return _tuned_choice(op, d, m, j, str(dtype).removeprefix("torch."), _index(device))


def config(op: str, d: int, m: int, j: int, dtype: torch.dtype, device: torch.device) -> dict[str, int] | None:
    """The tuned launch configuration for a kernel that is being called; None: take the kernel's default."""
    tuned = choose(op, d=d, m=m, j=j, dtype=dtype, device=device).config
    return dict(tuned) if tuned else None


# Under torch.compile a choice is a constant of the graph, not code to be traced. torch.compiler.assume_constant_result
# sets this very mark, but importing it costs seconds and imports Triton.
vars(choose)["_dynamo_marked_constant"] = vars(config)["_dynamo_marked_constant"] = True


def usable(op: str, device: torch.device) -> bool:
    """Whether Triton can run on a device, for an operation that is then taken always: it has no choice to make."""
    if op in _forced:
        return _forced[op].path == "triton"
    return not _unusable(device)


@contextmanager
def forced(choices: Mapping[str, Choice]) -> Iterator[None]:
    """Inside, these operations take these paths, whatever the files say; tuning, benchmarks and tests need it."""
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def is_forced() -> bool:
    """Whether this is inside :func:`forced`."""
    return bool(_forced)


def forget() -> None:
    """Reads the files anew at the next choice; call it when one has changed."""
    _tuned_choice.cache_clear()
    _files.cache_clear()


@cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _unusable(device: torch.device) -> str | None:
    """Why no Triton kernel can run on a device, whatever the shape; None if it can."""
    if device.type != "cuda":
        return f"the tensors are on the {device.type.upper()}"
    if not triton_is_installed():
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        return f"sm_{major}{minor} is older than sm_{OLDEST[0]}{OLDEST[1]}"
    return None


@cache
def _files(index: int) -> list[tuned_files.Tuned]:
    return tuned_files.files_for(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


@cache
def _tuned_choice(op: str, d: int, m: int, j: int, dtype: str, index: int) -> Choice:
    files = _files(index)
    for file in files:
        entry = file.nearest(op, d, m, j, dtype)
        if entry is None:
            continue
        times = " against ".join(f"{name} {us:.1f} us" for name, us in sorted(entry.microseconds.items()))
        is_faster = "is estimated to be the faster" if file.estimated else "is the faster"
        why = f"{entry.path} {is_faster} at {entry}" + (f" ({times})" if times else "") + f", {file.path.name}"
        return Choice(entry.path, entry.config if entry.path == "triton" else None, why)
    limits = ", ".join(f"{factor:g}x in {name}" for name, factor in tuned_files.LIMITS.items())
    where = " or ".join(str(f.path) for f in files) or "any file; run 'mlpint tune'"
    return Choice("torch", None, f"no tuned entry for {op} {dtype} within {limits} in {where}")
