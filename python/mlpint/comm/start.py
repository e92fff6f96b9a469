"""Finds out how this process was started, and connects the ranks in the way that fits."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from .. import _core
from . import guard, launchers, mpi, nccl, process_group, waiting
from .communicator import Comm, connects
from .host_staging import StagedTransport

_DEFAULT_STALL_LIMIT = 600.0

_current: Comm | None = None
_of_users: dict[int, tuple[Any, Comm]] = {}  # by id: a communicator of the user's, kept alive, and what was made of it


def init(*, data: int | None = None, stall_limit: float | None = None, backend: str | None = None) -> Comm:
    """Finds out how this process was started and connects the ranks. Collective; a second call gives the same Comm.

    An mpirun (Open MPI, MPICH, Intel MPI, srun with a PMI) is served by MPI through mpi4py; torchrun and srun without a
    PMI by torch.distributed; a process started alone is one rank. Where every rank has a GPU of its own, NCCL moves
    what is on the GPUs. With several ranks the failure of one ends all.

    Args:
        data: D: the ranks are a mesh of D replicas of the model, each trained on its own part of the data and spread
            over 1/D of the ranks, consecutive ones. The Comm is then that of one replica; ``comm.data`` are the ranks
            with the same layers in all of them, between which :func:`mlpint.average_gradients` takes the mean, and
            ``comm.world`` all ranks. Default: 1, or what an earlier call has said.
        stall_limit: seconds a rank waits for another before it gives up and ends the job. Default: the environment
            variable MLPINT_STALL_LIMIT, else 600. After MLPINT_WARN_AFTER seconds, else 30, a line on stderr says who
            waits for whom in what.
        backend: "mpi", "gloo" or "self" to insist on one, without NCCL; by default what the launcher suggests.

    Raises:
        LaunchError: a RuntimeError; the launcher's MPI is missing or not the one that mpi4py loads; says what to do.
        ValueError: a stall limit that is not a positive number, an unknown backend, or one that the launcher has not;
            replicas that do not divide the ranks, or other ones than before.
    """
    global _current
    if backend not in (None, "mpi", "gloo", "self"):
        raise ValueError(f"backend must be 'mpi', 'gloo' or 'self', got {backend!r}")
    limit = _checked_stall_limit(stall_limit)
    waiting.warn_after()  # raises here what is wrong with it
    if _current is None:
        _current = _start(limit, backend)
    elif stall_limit is not None:
        _current.stall_limit = limit
    if data is not None and data != _current.data.size:
        _current = replicated(_current, data)
    return _current


def _start(stall_limit: float, backend: str | None) -> Comm:
    launch = launchers.detect()
    kinds = {"mpi": "mpi", "gloo": "torch", "self": "alone"}
    kind = kinds[backend] if backend else launch.kind
    if kind not in (launch.kind, "alone"):
        raise ValueError(
            f"backend {backend!r} needs {'mpirun' if kind == 'mpi' else 'torchrun'}, but this process was started by "
            f"{launch.launcher if launch.kind != 'alone' else 'no launcher'}"
        )
    if kind == "alone":
        return alone(stall_limit)
    if kind == "mpi":
        with guard.time_limit(stall_limit, f"rank {launch.rank}: MPI has not started within {stall_limit:g} s"):
            comm = _over_mpi(mpi.world(launch), stall_limit)
    else:
        store = process_group.start(launch, stall_limit)
        comm = _over_group(None, stall_limit, launch.local_rank, store)
    return _over_gpus(comm, with_nccl=backend is None)


@connects
def connect(x: Any) -> Comm:
    """What :meth:`Comm.of` makes of None, an mpi4py communicator or a torch process group."""
    stall_limit = _current.stall_limit if _current else _checked_stall_limit(None)
    if x is None:
        return _current or alone(stall_limit)
    if id(x) not in _of_users:
        _of_users[id(x)] = x, _connected(x, stall_limit)
    return _of_users[id(x)][1]


def _connected(x: Any, stall_limit: float) -> Comm:
    if mpi.is_communicator(x):
        return alone(stall_limit) if x.size == 1 else _over_gpus(_over_mpi(x, stall_limit))
    if not isinstance(x, dist.ProcessGroup):
        raise TypeError(
            f"comm must be None, a Comm, an mpi4py communicator or a torch ProcessGroup, got {x!r} of type "
            f"{type(x).__name__}"
        )
    if dist.get_world_size(x) == 1:
        return alone(stall_limit)
    return _over_gpus(_over_group(x, stall_limit, launchers.detect().local_rank))


def replicated(world: Comm, data: int) -> Comm:
    """A mesh of ``data`` replicas, as :func:`init` gives it, of ranks that are none yet. Collective.

    Layers send messages in every sweep and replicas once a step: the ranks of a replica are consecutive, and so are
    close to each other.

    Raises:
        ValueError: on all ranks; replicas that do not divide the ranks, or ranks that are a mesh already.
    """
    if isinstance(data, bool) or not isinstance(data, int) or data < 1 or world.size % data:
        raise ValueError(
            f"data = {data!r}: must be a number of replicas that divides the {world.size} ranks (each replica needs "
            "as many for its layers)"
        )
    if world.world is not world:
        raise ValueError(f"data = {data}: the ranks are a mesh of {world.data.size} replicas already")
    if data == 1:
        return world
    layers, with_nccl, mesh = world.size // data, world.name == "nccl", None
    if mpi.is_communicator(world.origin):
        replica, layer = divmod(world.rank, layers)
        parts = [world.origin.Split(replica, layer), world.origin.Split(layer, replica)]
    else:
        mesh = process_group.mesh(world.device, data, layers)
        parts = [mesh.get_group("layer"), mesh.get_group("data")]
    comms = []
    for part, size in zip(parts, (layers, data), strict=True):
        if size == 1:
            comms.append(Comm(_core.SelfTransport(), "self", world.local_rank, world.stall_limit, origin=part))
            continue
        if mesh is None:
            comm = _over_mpi(part, world.stall_limit, world.local_rank)
        else:
            comm = _over_group(part, world.stall_limit, world.local_rank)
        comms.append(_over_gpus(comm, with_nccl=with_nccl))
    comms[0].join_mesh(comms[1], world, mesh)
    return comms[0]


def alone(stall_limit: float) -> Comm:
    """This process as the only rank."""
    return Comm(_core.SelfTransport(), "self", 0, stall_limit)


def _over_mpi(communicator: Any, stall_limit: float, local_rank: int | None = None) -> Comm:
    if local_rank is None:
        local_rank = mpi.local_rank(communicator)
    own = communicator.Dup()  # the user's messages and ours never mix
    transport = mpi.transport(own)
    guard.install(guard.MpiGroup(communicator.Dup(), transport))
    return Comm(transport, "mpi", local_rank, stall_limit, keep=own, origin=communicator)


def _over_group(
    group: dist.ProcessGroup | None, stall_limit: float, local_rank: int | None, store: dist.Store | None = None
) -> Comm:
    origin, group = group, process_group.for_host_memory(group, stall_limit)
    transport = _core.PythonTransport(process_group.ProcessGroupTransport(group))
    transport.stall_limit = stall_limit
    guard.install(guard.TorchGroup(transport.rank, transport.size, store))
    if local_rank is None:
        local_rank = _local_rank(Comm(transport, "gloo", 0, stall_limit))
    return Comm(transport, "gloo", local_rank, stall_limit, keep=store, origin=origin)


def _local_rank(comm: Comm) -> int:
    """Rank among those on this machine. Collective."""
    machines = comm.gather(launchers.this_machine())
    return machines[: comm.rank].count(machines[comm.rank])


def _over_gpus(comm: Comm, with_nccl: bool = True) -> Comm:
    """The same ranks with a way for what is on GPUs: NCCL where every rank has one of its own, else by the host."""
    if comm.size == 1:
        return comm
    if nccl.own_gpu_each(comm) and with_nccl and nccl.is_installed(comm):
        over_nccl = nccl.nccl_transport(comm.transport, comm.device)
        return Comm(over_nccl, "nccl", comm.local_rank, comm.stall_limit, keep=comm)
    if comm.device.type == "cuda":
        torch.cuda.set_device(comm.device)
        staged = _core.PythonTransport(StagedTransport(comm.transport))
        return Comm(staged, comm.name, comm.local_rank, comm.stall_limit, keep=comm)
    return comm


def _checked_stall_limit(stall_limit: float | None) -> float:
    if stall_limit is not None:
        return launchers.positive_seconds("stall_limit", stall_limit)
    name = "MLPINT_STALL_LIMIT"
    return launchers.positive_seconds(name, os.environ.get(name, _DEFAULT_STALL_LIMIT))
