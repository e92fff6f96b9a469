"""The ranks of a job: how many there are, which this one is, and what they do together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _core
from ..state import State
from .sum_in_parts import SumInParts
from .waiting import operation

_GATHER, _SUM = _core.USER_TAG + 8, _core.USER_TAG + 9
_LARGE_SUM = 1 << 14  # elements; above, a message's length counts more than that it is one more

_connect: Callable[[Any], Comm]


def connects(function: Callable[[Any], Comm]) -> Callable[[Any], Comm]:
    """Has :meth:`Comm.of` ask this function: how ranks are connected is start.py's, which imports this file."""
    global _connect
    _connect = function
    return function


class Comm:
    """The ranks of a job and what they do together. Every method is collective.

    In a mesh of replicas (``mlpint.init(data=D)``) these are the ranks that share the layers of one replica;
    :attr:`data` and :attr:`world` are the others.

    Attributes:
        rank, size: of this process, and how many there are.
        local_rank: rank among those on this machine.
        device: the GPU of this rank where there are GPUs, else the CPU.
        name: "mpi", "gloo", "nccl" or "self".
        transport: the core's; ``transport.control`` moves small messages in host memory.
        mesh: torch's DeviceMesh ("data", "layer"), where torch.distributed connects the ranks of a mesh; else None.
    """

    def __init__(self, transport, name: str, local_rank: int, stall_limit: float, keep=None, origin=None) -> None:
        self.rank: int = transport.rank
        self.size: int = transport.size
        self.local_rank = local_rank
        self.device = _device(local_rank)
        self.name = name
        self.transport = transport
        self.agreements = 0  # how often the ranks have agreed on an operation
        self._keep = keep  # what the transport refers to and does not own
        self._origin = origin  # the mpi4py communicator or torch group it was made of; None: torch's default group
        self._mesh: tuple[Comm, Comm] | None = None  # data, world
        self._alone: Comm | None = None
        self.mesh: Any = None
        self.stall_limit = stall_limit

    @staticmethod
    def of(x) -> Comm:
        """A Comm from None (the one of `init`, else this process alone), a Comm, an mpi4py communicator or a torch
        process group, sub-groups included. Collective over the ranks of x."""
        return x if isinstance(x, Comm) else _connect(x)

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
        for comm in self._mesh or ():
            comm.stall_limit = seconds

    @property
    def data(self) -> Comm:
        """The ranks that hold the same layers as this one, one in each replica; without a mesh this one alone."""
        if self._mesh:
            return self._mesh[0]
        if self._alone is None:
            self._alone = Comm(_core.SelfTransport(), "self", self.local_rank, self.stall_limit)
        return self._alone

    @property
    def world(self) -> Comm:
        """The ranks of all replicas; without a mesh these."""
        return self._mesh[1] if self._mesh else self

    def join_mesh(self, data: Comm, world: Comm, mesh: Any) -> None:
        """Makes these ranks a replica of a mesh."""
        self._mesh, self.mesh = (data, world), mesh

    @property
    def origin(self) -> Any:
        """The mpi4py communicator or torch group that these ranks come from; None: torch's default group."""
        return self._keep.origin if isinstance(self._keep, Comm) else self._origin

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """The torch process group of these ranks, for torch's DDP or FSDP; None where MPI connects them."""
        return self.origin if isinstance(self.origin, torch.distributed.ProcessGroup) else None

    def use(self, device: torch.device) -> None:
        """Has this rank work on another device; not collective."""
        for comm in (self, self.data, self.world):
            comm.device = device

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

    def flush(self) -> None:
        """Waits until all that this rank has posted has left; not collective."""
        self.transport.flush()
        self.transport.control.flush()
        if isinstance(self._keep, Comm):
            self._keep.flush()

    @operation("barrier")
    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self.transport.control.sum(0.0)

    @operation("broadcast")
    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Overwrites `tensor` with that of rank `root`; any shape and dtype, alike on all ranks. Returns it."""
        self._check_root(root)
        if self.size > 1:
            moved = tensor.detach().contiguous()
            self._transport(tensor).broadcast(State([moved]), root)
            _assign(tensor, moved)
        return tensor

    @operation("sum_ordered")
    def sum_ordered(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over ranks, added in rank order, and so equal to the last bit everywhere."""
        if self.size == 1:
            return
        for kind in dict.fromkeys(t.device.type for t in tensors):
            self._sum([t for t in tensors if t.device.type == kind])

    def _sum(self, tensors: list[torch.Tensor]) -> None:
        transport, moved = self._transport(tensors[0]), [t.detach().contiguous() for t in tensors]
        # On GPUs all goes over the first rank: parts would be an all-to-all of NCCL's, which has not been tried.
        if sum(m.numel() for m in moved) < _LARGE_SUM or tensors[0].device.type != "cpu":
            self._sum_on_first(transport, moved)
        else:
            for dtype in dict.fromkeys(m.dtype for m in moved):
                self._sum_in_parts(transport, [m for m in moved if m.dtype == dtype])
        for tensor, m in zip(tensors, moved, strict=True):
            _assign(tensor, m)

    def _sum_on_first(self, transport: _core.Transport, moved: list[torch.Tensor]) -> None:
        """Two messages one after the other."""
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

    def _sum_in_parts(self, transport: _core.Transport, moved: list[torch.Tensor]) -> None:
        flat = torch.cat([m.flatten() for m in moved])
        SumInParts(transport, flat, _SUM).complete()
        for tensor, total in zip(moved, flat.split([m.numel() for m in moved]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def begin_sum(self, flat: torch.Tensor, tag: int) -> SumInParts:
        """Begins a sum as :meth:`sum_ordered`'s of one flat tensor; see there for the tag."""
        return SumInParts(self._transport(flat), flat, tag)

    @operation("gather")
    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, in rank order, on every rank; any lengths."""
        if self.size == 1:
            return [message]
        control = self.transport.control
        lengths = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        lengths[self.rank] = len(message)
        if self.rank > 0:
            control.post(0, _GATHER, State([lengths[self.rank : self.rank + 1].clone()]))
            control.post(0, _GATHER, State([_bytes_tensor(message)]))
        else:
            parts = [message]
            for r in range(1, self.size):
                control.receive(r, _GATHER, State([lengths[r : r + 1]])).wait(control.stall_limit)
                part = torch.empty(int(lengths[r]), dtype=torch.uint8, device="cpu")
                control.receive(r, _GATHER, State([part])).wait(control.stall_limit)
                parts.append(part.numpy().tobytes())
        control.broadcast(State([lengths]), 0)
        total = torch.empty(int(lengths.sum()), dtype=torch.uint8, device="cpu")
        if self.rank == 0:
            total = _bytes_tensor(b"".join(parts))
        control.broadcast(State([total]), 0)
        everything, result = total.numpy().tobytes(), []
        for n in lengths.tolist():
            result.append(everything[:n])
            everything = everything[n:]
        return result

    @operation("vote")
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
    empty = torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else empty


def _opinion(value: str | None, ranks: list[int]) -> str:
    where = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return f"{'absent' if value is None else value} on {where}"
