"""torch.distributed process groups as a transport: torchrun without an MPI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import _core
from .launchers import Launch

# Sends and receives of a process group match by tag, and users send on the group too: ours start far from theirs.
_TAGS = 0x6D6C0000


def start(launch: Launch, stall_limit: float) -> dist.Store | None:
    """Starts the default process group (gloo; NCCL too where there are GPUs) unless the script has done so.

    Returns the store that the ranks meet at, or None where the script made the group.
    """
    if dist.is_initialized():
        return None
    timeout = timedelta(seconds=stall_limit)
    url = f"tcp://{launch.address}:{launch.port}"
    store, rank, size = next(dist.rendezvous(url, launch.rank, launch.size, timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return store


class ProcessGroupTransport:
    """What `_core.PythonTransport` asks for, over a torch process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def send(self, to: int, tag: int, state) -> _Transfer:
        what = f"rank {self.rank} sending to rank {to}"
        with _named(what):
            works = [dist.isend(t, group=self.group, group_dst=to, tag=_TAGS + tag) for t in _tensors(state)]
        return _Transfer(works, what)

    def receive(self, source: int, tag: int, state) -> _Transfer:
        what = f"rank {self.rank} receiving from rank {source}"
        with _named(what):
            works = [dist.irecv(t, group=self.group, group_src=source, tag=_TAGS + tag) for t in _tensors(state)]
        return _Transfer(works, what)


def _tensors(state) -> list[torch.Tensor]:
    if isinstance(state, memoryview):  # the core's own messages
        return [torch.frombuffer(state, dtype=torch.uint8)]
    state.buffers()  # makes them contiguous
    return [t for t in state.tensors if t.numel() > 0]


class _Transfer:
    def __init__(self, works: list, what: str) -> None:
        self.works = works
        self.what = what

    def test(self) -> bool:
        # Gloo moves data in a thread of its own but completes a work only when it is waited for, so that a transfer
        # under way is reported as such until then.
        self.works = [w for w in self.works if not w.is_completed()]
        return not self.works

    def wait(self, seconds: float) -> None:
        with _named(self.what):
            for work in self.works:
                work.wait(timedelta(seconds=seconds))
        self.works = []


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of gloo, which name addresses, as errors that name ranks."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if match := re.search(r"imed out waiting (\d+)ms", text):
            reason = f"nothing moved for {int(match[1]) / 1000:.0f} s; that rank is stopped, hung or out of step"
        elif re.search("onnection (closed|reset)|roken pipe", text):
            reason = "connection lost; that process has ended or was killed"
        else:
            reason = text
        raise _core.TransferError(f"{what}: {reason}") from None
