"""Everything that a Comm does, on any number of ranks and over every transport."""

import copy
import sys
import time
from types import SimpleNamespace
from unittest import mock

import torch
from runner import run

import mlpint
from mlpint import Comm, _core
from mlpint.comm import launchers
from mlpint.comm.host_staging import StagedTransport
from mlpint.parallel.trace import clock_offset
from mlpint.state import State

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def of_rank(rank, shape, dtype=torch.float32):
    """The tensor that every rank knows rank `rank` to have."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 50).to(dtype)


def raises(error, text, call):
    try:
        call()
    except error as e:
        assert text in str(e), f"{text!r} is not in {str(e)!r}"
    else:
        raise AssertionError(f"no {error.__name__}")


def knows_the_launch(comm):
    kind = launchers.detect().kind
    assert comm.name == {"alone": "self", "mpi": "mpi", "torch": "gloo"}[kind], comm
    assert comm.size == launchers.detect().size
    assert sorted(int(m) for m in comm.gather(str(comm.rank).encode())) == list(range(comm.size))
    assert comm.gather(str(comm.local_rank).encode())[comm.rank] == str(comm.rank).encode()  # all on this machine
    assert comm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def is_one_object(comm):
    assert mlpint.init() is comm and Comm.of(None) is comm and Comm.of(comm) is comm
    assert copy.deepcopy({"comm": comm})["comm"] is comm
    before = comm.stall_limit
    mlpint.init(stall_limit=17.5)
    assert comm.stall_limit == comm.transport.control.stall_limit == 17.5
    comm.stall_limit = before


def broadcasts_any_tensor(comm):
    for root in range(comm.size):
        for dtype in DTYPES:
            for shape in [(), (0,), (3, 5), (70_000,)]:
                tensor = of_rank(comm.rank, shape, dtype)
                assert comm.broadcast(tensor, root) is tensor
                assert torch.equal(tensor, of_rank(root, shape, dtype)), (root, dtype, shape)


def broadcasts_views_and_parameters(comm):
    last = comm.size - 1
    whole = of_rank(comm.rank, (4, 6))
    comm.broadcast(whole[:, ::2].t(), last)
    assert torch.equal(whole[:, ::2], of_rank(last, (4, 6))[:, ::2])
    assert torch.equal(whole[:, 1::2], of_rank(comm.rank, (4, 6))[:, 1::2])
    parameter = torch.nn.Parameter(of_rank(comm.rank, (3,)))
    comm.broadcast(parameter, last)
    assert torch.equal(parameter, of_rank(last, (3,))) and parameter.requires_grad


def refuses_roots_that_do_not_exist(comm):
    for root in (-1, comm.size):
        raises(ValueError, f"got {root}", lambda root=root: comm.broadcast(torch.zeros(1), root))


def sums_in_rank_order(comm):
    shapes = [(1000,), (3, 4), ()]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        sums = [of_rank(comm.rank, shape, dtype) for shape in shapes]
        comm.sum_ordered(sums)
        for shape, total in zip(shapes, sums, strict=True):
            expected = of_rank(0, shape, dtype)
            for r in range(1, comm.size):
                expected = expected + of_rank(r, shape, dtype)
            assert torch.equal(total, expected), (dtype, shape)
    transposed = of_rank(comm.rank, (3, 4)).t()
    comm.sum_ordered([transposed])
    assert len(set(comm.gather(transposed.contiguous().numpy().tobytes()))) == 1
    comm.sum_ordered([])


def gathers_messages_of_any_length(comm):
    assert comm.gather(bytes([comm.rank]) * comm.rank) == [bytes([r]) * r for r in range(comm.size)]
    assert comm.gather(b"") == [b""] * comm.size
    assert comm.gather(b"x" * 100_000 * comm.rank) == [b"x" * 100_000 * r for r in range(comm.size)]


def votes(comm):
    comm.vote({"levels": "2", "seed": "7"}, "the configuration")
    if comm.size > 1:
        ours = {"levels": str(2 + (comm.rank == 1)), "seed": "7"} | ({"extra": "x"} if comm.rank == 0 else {})
        rest = "rank 0" if comm.size == 2 else "ranks " + ", ".join(str(r) for r in range(comm.size) if r != 1)
        raises(ValueError, f"levels is 2 on {rest}, 3 on rank 1; extra is x on rank 0", lambda: comm.vote(ours, "it"))
        comm.barrier()  # they all raised, and go on together


def keeps_the_order_of_messages(comm):
    following, previous = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.size == 1:
        return
    sizes = [1, 400_000, 3, 200_000, 0, 7]  # eager and rendezvous messages
    for i, size in enumerate(sizes):
        tensors = [of_rank(comm.rank + i, (size,)), of_rank(i, (2,), torch.int64)]
        comm.transport.post(following, _core.USER_TAG, State(tensors))
    for i, size in enumerate(sizes):
        arrived = State([torch.empty(size), torch.empty(2, dtype=torch.int64)])
        comm.transport.receive(previous, _core.USER_TAG, arrived).wait(20)
        assert torch.equal(arrived.tensors[0], of_rank(previous + i, (size,)))
        assert torch.equal(arrived.tensors[1], of_rank(i, (2,), torch.int64))
    comm.transport.flush()


def stays_apart_from_the_users_messages(comm):
    if comm.size == 1:
        return
    ours, theirs = torch.full((3,), 1.0), torch.full((3,), 2.0)
    peer = {0: 1, 1: 0}.get(comm.rank)
    if peer is None:
        return
    arrived, arrived_theirs = State([torch.empty(3)]), torch.empty(3)
    transfer = comm.transport.receive(peer, _core.USER_TAG, arrived)
    if comm.name == "mpi":
        from mpi4py import MPI

        request = MPI.COMM_WORLD.Isend(theirs.numpy(), peer, _core.USER_TAG)
        comm.transport.post(peer, _core.USER_TAG, State([ours]))
        MPI.COMM_WORLD.Recv(arrived_theirs.numpy(), peer, _core.USER_TAG)
        request.Wait()
    else:
        import torch.distributed as dist

        work = dist.isend(theirs, peer, tag=_core.USER_TAG)
        comm.transport.post(peer, _core.USER_TAG, State([ours]))
        dist.recv(arrived_theirs, peer, tag=_core.USER_TAG)
        work.wait()
    transfer.wait(20)
    comm.transport.flush()
    assert torch.equal(arrived.tensors[0], ours) and torch.equal(arrived_theirs, theirs)


def serves_the_users_communicators(comm):
    """The whole world and two sub-groups of it, of even and of odd ranks."""
    members = [r for r in range(comm.size) if r % 2 == comm.rank % 2]
    if comm.name == "mpi":
        from mpi4py import MPI

        world, part = MPI.COMM_WORLD, MPI.COMM_WORLD.Split(comm.rank % 2)
    elif comm.name == "gloo":
        import torch.distributed as dist

        groups = [dist.new_group([r for r in range(comm.size) if r % 2 == odd]) for odd in (0, 1)]
        world, part = dist.group.WORLD, groups[comm.rank % 2]
    else:
        return
    for given, size in (world, comm.size), (part, len(members)):
        made = Comm.of(given)
        assert Comm.of(given) is made and made is not comm and made.size == size
        for scenario in EVERYWHERE:
            scenario(made)
    assert Comm.of(part).gather(str(comm.rank).encode()) == [str(r).encode() for r in members]


def refuses_what_is_no_communicator(comm):
    raises(TypeError, "got [1] of type list", lambda: Comm.of([1]))


def goes_by_the_host(comm):
    """As for ranks that share a GPU."""
    if comm.size > 1:
        staged = Comm(_core.PythonTransport(StagedTransport(comm.transport)), "staged", 0, comm.stall_limit, keep=comm)
        for scenario in EVERYWHERE:
            scenario(staged)


def sets_clocks_of_other_machines(comm):
    late = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 100 * comm.rank)
    with mock.patch.object(sys.modules[clock_offset.__module__], "time", late):
        assert clock_offset(comm) == 0  # one machine, one clock
        with mock.patch.object(launchers, "this_machine", lambda: f"machine {comm.rank // 2}".encode()):
            offset = clock_offset(comm)
    assert abs(offset + 100 * comm.rank) < 1 if comm.rank >= 2 else offset == 0, offset


def waits_no_longer_than_told(comm):
    if comm.size > 1 and comm.name == "mpi":  # gloo closes its connections after this
        if comm.rank == 0:
            late = comm.transport.receive(1, _core.USER_TAG + 1, State([torch.empty(1)]))
            raises(_core.TransferError, "rank 0 receiving from rank 1: nothing moved", lambda: late.wait(0.2))
        comm.barrier()
        if comm.rank == 1:  # what was waited for in vain, so that nothing is left over
            comm.transport.post(0, _core.USER_TAG + 1, State([torch.zeros(1)]))
        elif comm.rank == 0:
            late.wait(20)


EVERYWHERE = [
    broadcasts_any_tensor,
    broadcasts_views_and_parameters,
    sums_in_rank_order,
    gathers_messages_of_any_length,
    votes,
    keeps_the_order_of_messages,
]

if __name__ == "__main__":
    run(
        [
            knows_the_launch,
            is_one_object,
            *EVERYWHERE,
            refuses_roots_that_do_not_exist,
            stays_apart_from_the_users_messages,
            serves_the_users_communicators,
            refuses_what_is_no_communicator,
            goes_by_the_host,
            sets_clocks_of_other_machines,
            waits_no_longer_than_told,
        ]
    )
