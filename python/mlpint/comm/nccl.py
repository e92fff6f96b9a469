"""NCCL between GPUs, through the library that torch has loaded."""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from .. import _core
from ..errors import OtherRankError
from ..state import State
from .communicator import Comm
from .guard import time_limit

_NAME = "libnccl.so.2"
_ID_BYTES = 128
_T = TypeVar("_T")


class NcclTransport(_core.NcclTransport):
    """The core's transport, and how to wait for it."""

    def synchronize(self) -> None:
        """Waits until this rank's GPU has done what is on its current stream.

        A rank that waits for another does so on the GPU, where nothing limits the wait: ``loss.item()`` would wait for
        a stopped rank for ever. Call this before it.

        Raises:
            TransferError: NCCL reports a failed transfer, or the stream has not moved for ``stall_limit`` seconds; what
                was enqueued is aborted then.
        """
        if self.device < 0:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        start = time.monotonic()
        while not event.query():
            self.check()
            waited = time.monotonic() - start
            if waited > self.stall_limit:
                self.abort()
                raise _core.TransferError(
                    f"rank {self.rank}: GPU {self.device} has waited {waited:.0f} s for another rank, which is "
                    "stopped, hung or out of step"
                )
            if waited > 1e-3:
                time.sleep(1e-4)


def nccl_transport(
    control: _core.Transport,
    device: torch.device | str | int,
    library: str | os.PathLike[str] | None = None,
    *,
    host_memory: bool = False,
) -> NcclTransport:
    """A transport that moves CUDA tensors with NCCL, on torch's current stream. Collective over the ranks of `control`.

    Args:
        control: transport between the same ranks for host memory: the rendezvous, headers and norms go over it.
        device: this rank's GPU; it becomes the process's current CUDA device. One rank a GPU.
        library: path of ``libnccl.so.2``. By default the environment variable ``MLPINT_NCCL``, else the library that
            torch has loaded, else the one the system or the ``nvidia-nccl`` wheel has.
        host_memory: move CPU tensors instead. NCCL cannot; for a substitute library in tests.

    Raises:
        RuntimeError: no usable NCCL library here, or not rank 0's version of it.
        OtherRankError: a RuntimeError; so it is on another rank.
        ValueError: the device is no GPU of this machine.
    """

    def open_library() -> tuple[_core.NcclLibrary, int]:
        index = -1 if host_memory else _device_index(device, control)
        return _core.NcclLibrary(_candidates(library)), index

    def check_version() -> None:
        if nccl.version != version:
            raise RuntimeError(
                f"rank {control.rank} has NCCL {nccl.version} ({nccl.path}) and rank 0 has {version}: install the same "
                "torch for all ranks, or set MLPINT_NCCL to the same library"
            )

    nccl, index = _on_every_rank(control, open_library, "NCCL cannot be used")
    header = bytearray(_ID_BYTES + 8)
    if control.rank == 0:
        header[:] = nccl.unique_id() + nccl.version.to_bytes(8, "little")
    control.broadcast(State([torch.frombuffer(header, dtype=torch.uint8)]), 0)
    unique_id, version = bytes(header[:_ID_BYTES]), int.from_bytes(header[_ID_BYTES:], "little")
    _on_every_rank(control, check_version, "NCCL has another version")

    limit = control.stall_limit
    with time_limit(limit, f"rank {control.rank}: NCCL has not connected the {control.size} ranks within {limit:g} s"):
        if host_memory:
            return NcclTransport(nccl, control, unique_id, -1, lambda: 0)
        torch.cuda.set_device(index)
        return NcclTransport(nccl, control, unique_id, index, lambda: torch.cuda.current_stream(index).cuda_stream)


def own_gpu_each(comm: Comm) -> bool:
    """Whether every rank has a GPU that no other rank has, as NCCL demands. Collective."""
    mine = str(torch.cuda.get_device_properties(comm.device).uuid) if comm.device.type == "cuda" else ""
    gpus = comm.gather(mine.encode())
    return b"" not in gpus and len(set(gpus)) == comm.size


def is_installed(comm: Comm) -> bool:
    """Whether every rank has an NCCL library; warns where one has none, unless MLPINT_NCCL names it. Collective."""
    reason = ""
    if "MLPINT_NCCL" not in os.environ:
        try:
            _core.NcclLibrary(_candidates(None))
        except RuntimeError as error:
            reason = str(error)
    reasons = comm.gather(reason.encode())
    missing = [rank for rank, text in enumerate(reasons) if text]
    if missing and comm.rank == 0:
        warnings.warn(
            f"GPU memory goes by the host, which is slow, for want of NCCL on rank {', '.join(map(str, missing))}: "
            f"{reasons[missing[0]].decode()}",
            stacklevel=2,
        )
    return not missing


def _candidates(library: str | os.PathLike[str] | None) -> list[str]:
    chosen = library or os.environ.get("MLPINT_NCCL")
    if chosen:
        return [os.fspath(chosen)]
    wheel = importlib.util.find_spec("nvidia")
    places = (wheel.submodule_search_locations if wheel else None) or ()
    return [_NAME, *(str(Path(place, "nccl", "lib", _NAME)) for place in places)]


def _device_index(device: torch.device | str | int, control: _core.Transport) -> int:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"rank {control.rank}: NCCL moves memory of GPUs, not of device {str(device)!r}")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"rank {control.rank} was given GPU {index} and sees {torch.cuda.device_count()} GPUs; start one rank a GPU"
        )
    return index


def _on_every_rank(control: _core.Transport, action: Callable[[], _T], what: str) -> _T:
    """Does something that raises on every rank if it does on one: a rank that went on alone would wait for ever."""
    try:
        result = action()
    except (RuntimeError, ValueError):
        control.sum(1.0)
        raise
    if failed := int(control.sum(0.0)):
        raise OtherRankError(f"rank {control.rank}: {what} on {failed} of {control.size} ranks, see their messages")
    return result
