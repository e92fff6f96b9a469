"""torch.distributed process groups as a transport: torchrun without an MPI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import _core
from ..errors import LaunchError
from .guard import time_limit
from .launchers import Launch
from .waiting import WatchedWaits

# Sends and receives of a process group match by tag, and users send on the group too: ours start far from theirs.
_TAGS = 0x6D6C0000
_ADDRESSES = (
    "All hosts must reach MASTER_ADDR, and one another by their names, whose addresses gloo takes: where a host's name "
    "means 127.0.0.1, set GLOO_SOCKET_IFNAME to its network interface (as in GLOO_SOCKET_IFNAME=eth0)"
)


def start(launch: Launch, stall_limit: float) -> dist.Store | None:
    """Starts the default process group (gloo; NCCL too where there are GPUs) unless the script has done so.

    Returns the store that the ranks meet at, or None where the script made the group.

    Raises:
        LaunchError: the ranks could not be connected; says what to set. After the stall limit the process is ended.
    """
    if dist.is_initialized():
        return None
    timeout = timedelta(seconds=stall_limit)
    url = f"tcp://{launch.address}:{launch.port}"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _connecting(launch.rank, launch.size, stall_limit, f" at {launch.address}:{launch.port}"):
        store, rank, size = next(dist.rendezvous(url, launch.rank, launch.size, timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return store


def for_host_memory(group: dist.ProcessGroup | None, seconds: float) -> dist.ProcessGroup | None:
    """The group itself where it moves what is in host memory, else a new gloo group of the same ranks. Collective.

    None is the default group. Raises as :func:`start`.
    """
    if "cpu" in dist.get_backend_config(group):
        return group
    ranks, timeout = dist.get_process_group_ranks(group), timedelta(seconds=seconds)
    with _connecting(dist.get_rank(group), len(ranks), seconds):
        return dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)


def mesh(device: torch.device, data: int, layers: int) -> dist.device_mesh.DeviceMesh:
    """The default group's ranks as a mesh of replicas of consecutive ranks. Collective."""
    return dist.device_mesh.init_device_mesh(device.type, (data, layers), mesh_dim_names=("data", "layer"))


@contextmanager
def _connecting(rank: int, size: int, seconds: float, where: str = "") -> Iterator[None]:
    failure = f"rank {rank} of {size} could not connect to the others{where}"
    # Gloo tries again and again, each time for as long as it is told.
    with time_limit(seconds, f"{failure} within {seconds:g} s. {_ADDRESSES}"):
        try:
            yield
        except RuntimeError as error:
            raise LaunchError(f"{failure}: {error}. {_ADDRESSES}") from None


class ProcessGroupTransport:
    """What `_core.PythonTransport` asks for, over a torch process group (None: the default one)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._waits = WatchedWaits(self.rank)

    def send(self, to: int, tag: int, state) -> _Transfer:
        what = f"rank {self.rank} sending to rank {to}"
        with _named(what):
            works = [dist.isend(t, group=self.group, group_dst=to, tag=_TAGS + tag) for t in _tensors(state)]
        return _Transfer(works, what, to, self._waits)

    def receive(self, source: int, tag: int, state) -> _Transfer:
        what = f"rank {self.rank} receiving from rank {source}"
        with _named(what):
            works = [dist.irecv(t, group=self.group, group_src=source, tag=_TAGS + tag) for t in _tensors(state)]
        return _Transfer(works, what, source, self._waits)


def _tensors(state) -> list[torch.Tensor]:
    if isinstance(state, memoryview):  # the core's own messages
        return [torch.frombuffer(state, dtype=torch.uint8)]
    state.buffers()  # makes them contiguous
    return [t for t in state.tensors if t.numel() > 0]


class _Transfer:
    def __init__(self, works: list[dist.Work | None], what: str, peer: int, waits: WatchedWaits) -> None:
        self.works = [work for work in works if work is not None]
        self.what, self.peer, self.waits = what, peer, waits

    def test(self) -> bool:
        # Gloo moves data in a thread of its own but completes a work only when it is waited for, so that a transfer
        # under way is reported as such until then.
        while self.works and self.works[0].is_completed():
            self.works.pop(0)
        return not self.works

    def wait(self, seconds: float) -> None:
        with _named(self.what), self.waits.waiting_for(self.peer):
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
