"""The ranks of a job: how many there are, which this one is, and what they do together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from .. import _core
from ..state import State
from . import guard, launchers

_GATHER, _SUM = _core.USER_TAG + 8, _core.USER_TAG + 9
_DEFAULT_STALL_LIMIT = 600.0

_current: Comm | None = None
_given: dict[int, tuple[Any, Comm]] = {}  # by id: a communicator of the user's, kept alive, and what was made of it


def init(*, stall_limit: float | None = None, backend: str | None = None) -> Comm:
    """Finds out how this process was started and connects the ranks. Collective; a second call gives the same Comm.

    An mpirun (Open MPI, MPICH, Intel MPI, srun with a PMI) is served by MPI through mpi4py; torchrun and srun without a
    PMI by torch.distributed; a process started alone is one rank. Where every rank has a GPU of its own, NCCL moves
    what is on the GPUs. With several ranks the failure of one ends all.

    Args:
        stall_limit: seconds a rank waits for another before it gives up and ends the job. Default: the environment
            variable MLPINT_STALL_LIMIT, else 600.
        backend: "mpi", "gloo" or "self" to insist on one, without NCCL; by default what the launcher suggests.

    Raises:
        LaunchError: a RuntimeError; the launcher's MPI is missing or not the one that mpi4py loads; says what to do.
        ValueError: a stall limit that is not a positive number, an unknown backend, or one that the launcher has not.
    """
    global _current
    if backend not in (None, "mpi", "gloo", "self"):
        raise ValueError(f"backend must be 'mpi', 'gloo' or 'self', got {backend!r}")
    limit = _stall_limit(stall_limit)
    if _current is None:
        _current = _start(limit, backend)
    elif stall_limit is not None:
        _current.stall_limit = limit
    return _current


def _start(stall_limit: float, backend: str | None) -> Comm:
    launch = launchers.detect()
    kind = {None: launch.kind, "mpi": "mpi", "gloo": "torch", "self": "alone"}[backend]
    if kind not in (launch.kind, "alone"):
        raise ValueError(
            f"backend {backend!r} needs {'mpirun' if kind == 'mpi' else 'torchrun'}, but this process was started by "
            f"{launch.launcher if launch.kind != 'alone' else 'no launcher'}"
        )
    if kind == "mpi":
        from . import mpi

        with guard.time_limit(stall_limit):
            comm = _mpi_comm(mpi.world(launch), stall_limit)
        return _over_gpus(comm, nccl=not backend)
    if kind == "torch":
        import torch.distributed as dist

        from . import process_group

        store = process_group.start(launch, stall_limit)
        comm = _group_comm(dist.group.WORLD, stall_limit, launch.local_rank, store)
        return _over_gpus(comm, nccl=not backend)
    return _alone(stall_limit)


def _alone(stall_limit: float) -> Comm:
    return Comm(_core.SelfTransport(), "self", 0, stall_limit)


def _stall_limit(given: float | None) -> float:
    name, value = "stall_limit", given
    if given is None:
        name, value = "MLPINT_STALL_LIMIT", os.environ.get("MLPINT_STALL_LIMIT", _DEFAULT_STALL_LIMIT)
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
    return seconds


def _mpi_comm(communicator, stall_limit: float) -> Comm:
    from . import mpi

    local_rank = mpi.local_rank(communicator)
    own = communicator.Dup()  # the user's messages and ours never mix
    transport = mpi.transport(own)
    guard.install(guard.MpiGroup(communicator.Dup(), transport))
    return Comm(transport, "mpi", local_rank, stall_limit, keep=own)


def _group_comm(group, stall_limit: float, local_rank: int, store=None) -> Comm:
    from .process_group import ProcessGroupTransport

    transport = _core.PythonTransport(ProcessGroupTransport(group))
    guard.install(guard.TorchGroup(transport.rank, transport.size, store))
    return Comm(transport, "gloo", local_rank, stall_limit, keep=store)


def _over_gpus(comm: Comm, nccl: bool = True) -> Comm:
    """The same ranks with a way for what is on GPUs: NCCL where every rank has one of its own, else by the host."""
    from .nccl import nccl_transport, own_gpu_each

    if comm.size == 1:
        return comm
    if own_gpu_each(comm) and nccl:
        transport = nccl_transport(comm.transport, comm.device)
        return Comm(transport, "nccl", comm.local_rank, comm.stall_limit, keep=comm)
    if comm.device.type == "cuda":
        from .host_staging import StagedTransport

        torch.cuda.set_device(comm.device)
        transport = _core.PythonTransport(StagedTransport(comm.transport))
        return Comm(transport, comm.name, comm.local_rank, comm.stall_limit, keep=comm)
    return comm


class Comm:
    """The ranks of a job and what they do together. Every method is collective.

    Attributes:
        rank, size: of this process, and how many there are.
        local_rank: rank among those on this machine.
        device: the GPU of this rank where there are GPUs, else the CPU.
        name: "mpi", "gloo", "nccl" or "self".
        transport: the core's; ``transport.control`` moves small messages in host memory.
    """

    def __init__(self, transport, name: str, local_rank: int, stall_limit: float, keep=None) -> None:
        self.rank: int = transport.rank
        self.size: int = transport.size
        self.local_rank = local_rank
        self.device = _device(local_rank)
        self.name = name
        self.transport = transport
        self._keep = keep  # what the transport refers to and does not own
        self.stall_limit = stall_limit

    @staticmethod
    def of(x) -> Comm:
        """A Comm from None (the one of `init`, else this process alone), a Comm, an mpi4py communicator or a torch
        process group, sub-groups included. Collective over the ranks of x."""
        if isinstance(x, Comm):
            return x
        limit = _current.stall_limit if _current else _stall_limit(None)
        if x is None:
            return _current or _alone(limit)
        if id(x) in _given:
            return _given[id(x)][1]
        from . import mpi

        if mpi.is_communicator(x):
            comm = _alone(limit) if x.size == 1 else _over_gpus(_mpi_comm(x, limit))
        else:
            import torch.distributed as dist

            if not isinstance(x, dist.ProcessGroup):
                raise TypeError(
                    f"comm must be None, a Comm, an mpi4py communicator or a torch ProcessGroup, got {x!r} of type "
                    f"{type(x).__name__}"
                )
            alone = dist.get_world_size(x) == 1
            comm = _alone(limit) if alone else _over_gpus(_group_comm(x, limit, launchers.detect().local_rank))
        _given[id(x)] = x, comm
        return comm

    @property
    def stall_limit(self) -> float:
        """Seconds a rank waits for another before it gives up."""
        return self.transport.stall_limit

    @stall_limit.setter
    def stall_limit(self, seconds: float) -> None:
        self.transport.stall_limit = seconds
        self.transport.control.stall_limit = seconds
        if isinstance(self._keep, Comm):
            self._keep.stall_limit = seconds

    def __repr__(self) -> str:
        return f"Comm(rank={self.rank}, size={self.size}, name={self.name!r}, device={str(self.device)!r})"

    def __deepcopy__(self, memo) -> Comm:
        return self  # a connection: a copied model speaks through the same one

    def synchronize(self) -> None:
        """Waits until this rank has done what it has put on its GPU, but not for ever for another rank; not collective.

        Raises:
            TransferError: NCCL reports a failed transfer, or another rank has kept this one waiting for too long.
        """
        if self.name == "nccl":
            self.transport.synchronize()

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self.transport.control.sum(0.0)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Overwrites `tensor` with that of rank `root`; any shape and dtype, alike on all ranks. Returns it."""
        self._check_root(root)
        if self.size > 1:
            moved = tensor.detach().contiguous()
            self._transport(tensor).broadcast(State([moved]), root)
            _assign(tensor, moved)
        return tensor

    def sum_ordered(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over ranks, added in rank order, and so equal to the last bit everywhere."""
        if self.size == 1:
            return
        for kind in dict.fromkeys(t.device.type for t in tensors):
            self._sum([t for t in tensors if t.device.type == kind])

    def _sum(self, tensors: list[torch.Tensor]) -> None:
        transport, moved = self._transport(tensors[0]), [t.detach().contiguous() for t in tensors]
        if self.rank == 0:
            arriving = State(torch.empty_like(m) for m in moved)
            for r in range(1, self.size):
                transport.receive(r, _SUM, arriving).wait(transport.stall_limit)
                for total, other in zip(moved, arriving.tensors, strict=True):
                    total += other
        else:
            transport.post(0, _SUM, State(moved))
            transport.flush()
        transport.broadcast(State(moved), 0)
        for tensor, m in zip(tensors, moved, strict=True):
            _assign(tensor, m)

    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, in rank order, on every rank; any lengths."""
        if self.size == 1:
            return [message]
        control = self.transport.control
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(message)
        if self.rank > 0:
            control.post(0, _GATHER, State([lengths[self.rank : self.rank + 1].clone()]))
            control.post(0, _GATHER, State([_bytes_tensor(message)]))
        else:
            parts = [message]
            for r in range(1, self.size):
                control.receive(r, _GATHER, State([lengths[r : r + 1]])).wait(control.stall_limit)
                part = torch.empty(int(lengths[r]), dtype=torch.uint8)
                control.receive(r, _GATHER, State([part])).wait(control.stall_limit)
                parts.append(part.numpy().tobytes())
        control.broadcast(State([lengths]), 0)
        total = _bytes_tensor(b"".join(parts)) if self.rank == 0 else torch.empty(int(lengths.sum()), dtype=torch.uint8)
        control.broadcast(State([total]), 0)
        everything, result = total.numpy().tobytes(), []
        for n in lengths.tolist():
            result.append(everything[:n])
            everything = everything[n:]
        return result

    def vote(self, values: dict[str, str], what: str) -> None:
        """Checks that all ranks pass the same values.

        Args:
            values: what must be alike, by name.
            what: what they describe, for the message.

        Raises:
            ValueError: on every rank alike, naming each value that differs and the ranks that have it.
        """
        votes = [json.loads(v) for v in self.gather(json.dumps(values).encode())]
        names = list(dict.fromkeys(name for vote in votes for name in vote))
        differences = []
        for name in names:
            ranks: dict[str | None, list[int]] = {}
            for r, vote in enumerate(votes):
                ranks.setdefault(vote.get(name), []).append(r)
            if len(ranks) > 1:
                differences.append(f"{name} is " + ", ".join(_opinion(value, rs) for value, rs in ranks.items()))
        if differences:
            raise ValueError(f"the ranks disagree on {what}: {'; '.join(differences)}. Start every rank with the same")

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise ValueError(f"root must be a rank from 0 to {self.size - 1}, got {root}")

    def _transport(self, tensor: torch.Tensor) -> _core.Transport:
        return self.transport.control if tensor.device.type == "cpu" else self.transport


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())  # one visible GPU a rank: always that one


def _assign(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if value.data_ptr() != tensor.data_ptr():  # else it is the tensor's own memory, which was contiguous
        with torch.no_grad():
            tensor.copy_(value)


def _bytes_tensor(message: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)


def _opinion(value: str | None, ranks: list[int]) -> str:
    where = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return f"{'absent' if value is None else value} on {where}"
