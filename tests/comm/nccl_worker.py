"""One rank of the tests of the NCCL transport: runs the checks named on the command line over the fake library."""

import copy
import gc
import os
import sys
import warnings

import torch

import mlpint.comm.nccl
import mlpint.comm.start
from mlpint import _core
from mlpint.comm import Comm, init
from mlpint.comm.nccl import nccl_transport
from mlpint.mgrit.options import MGRIT
from mlpint.parallel.layer_parallel import LayerParallel
from mlpint.state import State

TAG = _core.USER_TAG + 20
CANDIDATES = mlpint.comm.nccl._candidates


class OnGPU(State):
    """CPU tensors that pass for GPU memory."""

    def __init__(self, tensors, device=0):
        super().__init__(tensors)
        self.device = device

    def buffers(self):
        return [(pointer, size, self.device) for pointer, size, _ in super().buffers()]


def numbers(rank, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def raises(kind, part, call):
    try:
        call()
    except kind as error:
        assert part in str(error), error
        return
    raise AssertionError(f"no {kind.__name__} with {part!r}")


def exchange(transport, value, into, upwards=True):
    """Hands values on from rank to rank; each receives before it sends."""
    step = 1 if upwards else -1
    before, after = transport.rank - step, transport.rank + step
    if 0 <= before < transport.size:
        transport.receive(before, TAG, into).wait(10)
    if 0 <= after < transport.size:
        transport.post(after, TAG, value)
    transport.flush()


def traffic(comm):
    """Point to point both ways, several tensors in a state, broadcast, the sum over the control transport."""
    t, r = nccl_transport(comm.transport, comm.device, host_memory=True), comm.rank
    assert (t.rank, t.size, t.device) == (comm.rank, comm.size, -1)
    for upwards in (True, False):
        source = r - 1 if upwards else r + 1
        sent = (numbers(r, 5, 7).T, torch.arange(3 + r, 6 + r), torch.empty(0), numbers(r, 2, 2).bfloat16())
        into = State(torch.full_like(x, 9) for x in (sent[0].contiguous(), *sent[1:]))
        exchange(t, State(sent), into, upwards)
        if 0 <= source < comm.size:
            assert torch.equal(into.tensors[0], numbers(source, 5, 7).T)
            assert into.tensors[1].tolist() == [3 + source, 4 + source, 5 + source]
            assert torch.equal(into.tensors[3], numbers(source, 2, 2).bfloat16())
    for root in range(comm.size):
        state = State([numbers(r, 70_000), torch.tensor([r])])  # above the size of a socket's buffers
        t.broadcast(state, root)
        assert torch.equal(state.tensors[0], numbers(root, 70_000)) and int(state.tensors[1]) == root
    assert t.sum(r + 1.0) == comm.size * (comm.size + 1) / 2
    t.close()
    raises(
        RuntimeError, "has been closed", lambda: t.receive((r + 1) % comm.size, TAG, State([torch.zeros(1)])).wait(1)
    )


def order(comm):
    """A receive takes its place in the stream when it is waited for, not when it is posted."""
    t = nccl_transport(comm.transport, comm.device, host_memory=True)
    if comm.rank == 0:
        first, second = State([torch.zeros(4)]), State([torch.zeros(4)])
        a, b = t.receive(1, TAG, first), t.receive(1, TAG + 1, second)
        assert not a.test() and not b.test()
        t.post(1, TAG, State([torch.ones(4)]))  # rank 1 waits for this before it sends
        b.wait(10)
        assert b.test() and not a.test()
        a.wait(10)
        assert second.tensors[0][0] == 2 and first.tensors[0][0] == 3  # order of waiting, whatever the tags
    if comm.rank == 1:
        into = State([torch.zeros(4)])
        t.receive(0, TAG, into).wait(10)
        assert into.tensors[0][0] == 1
        t.post(0, TAG, State([torch.full((4,), 2.0)]))
        t.post(0, TAG + 1, State([torch.full((4,), 3.0)]))
    comm.barrier()
    t.check()


def devices(comm):
    """States on the GPU go over NCCL on the stream that is current, those on the host over the control transport."""
    library = _core.NcclLibrary([os.environ["MLPINT_NCCL"]])
    identity = torch.frombuffer(bytearray(library.unique_id()), dtype=torch.uint8)
    comm.transport.broadcast(State([identity]), 0)
    stream = 0x1234
    t = _core.NcclTransport(library, comm.transport, identity.numpy().tobytes(), 0, lambda: stream)
    os.environ["FAKE_NCCL_STREAM"] = hex(stream)
    for kind in (OnGPU, State):
        into = kind([torch.zeros(3, dtype=torch.float64)])
        exchange(t, kind([numbers(comm.rank, 3)]), into)
        if comm.rank > 0:
            assert torch.equal(into.tensors[0], numbers(comm.rank - 1, 3))
        stream = 0 if kind is OnGPU else stream  # the fake would refuse it
    other = (comm.rank + 1) % comm.size
    mixed = OnGPU([torch.zeros(1), torch.zeros(1)])
    mixed.buffers = lambda: [(*State.buffers(mixed)[0][:2], 0), State.buffers(mixed)[1]]
    raises(ValueError, "is on GPU 3", lambda: t.post(other, TAG, OnGPU([torch.zeros(1)], 3)))
    raises(ValueError, "is on the host", lambda: t.receive(other, TAG, mixed))
    raises(RuntimeError, "invalid argument", lambda: t.post(other, TAG, OnGPU([torch.zeros(1)])))
    del os.environ["FAKE_NCCL_STREAM"]
    comm.barrier()  # the others see a rank that leaves after an error


def failures(comm):
    """What NCCL reports becomes a TransferError that names both ranks, on every rank concerned."""
    r, other = comm.rank, 1 - comm.rank
    t = nccl_transport(comm.transport, comm.device, host_memory=True)
    if r == 0:
        raises(
            _core.TransferError, "rank 0 sending to rank 1 over NCCL", lambda: t.post(1, TAG, State([torch.ones(8)]))
        )
    else:
        transfer = t.receive(0, TAG, State([torch.ones(4)]))
        raises(_core.TransferError, "rank 1 receiving from rank 0 over NCCL", lambda: transfer.wait(10))
    raises(_core.TransferError, "invalid usage", t.check)

    t = nccl_transport(comm.transport, comm.device, host_memory=True)
    if r == 1:
        t.abort()
    comm.barrier()
    if r == 0:
        waiting = t.receive(1, TAG, State([torch.ones(4)]))
        raises(_core.TransferError, "remote process exited", waiting.test)
        raises(_core.TransferError, "remote process exited", lambda: waiting.wait(10))

    os.environ["FAKE_NCCL_TIMEOUT"] = "0.3"  # both send first: NCCL may deadlock, and the fake must see that
    t = nccl_transport(comm.transport, comm.device, host_memory=True)
    raises(_core.TransferError, "unhandled system error", lambda: t.post(other, TAG, State([torch.ones(4)])))
    del os.environ["FAKE_NCCL_TIMEOUT"]

    wrong = "no-such-libnccl.so" if r == 1 else None
    message = "no-such-libnccl.so" if r == 1 else "rank 0: NCCL cannot be used on 1 of 2 ranks"
    raises(RuntimeError, message, lambda: nccl_transport(comm.transport, comm.device, wrong, host_memory=True))
    os.environ["FAKE_NCCL_VERSION"] = str(22703 + r)
    message = "rank 1 has NCCL 22704" if r == 1 else "NCCL has another version on 1 of 2 ranks"
    raises(RuntimeError, message, lambda: nccl_transport(comm.transport, comm.device, host_memory=True))
    del os.environ["FAKE_NCCL_VERSION"]


def found(comm):
    """init() puts NCCL over its connection exactly where every rank has a GPU of its own."""
    assert mlpint.comm.start._over_gpus(comm) is comm  # no GPUs here
    found, join = mlpint.comm.nccl.own_gpu_each, mlpint.comm.nccl.nccl_transport
    mlpint.comm.nccl.own_gpu_each = lambda comm: True
    mlpint.comm.nccl.nccl_transport = lambda control, device: join(control, device, host_memory=True)
    over = mlpint.comm.start._over_gpus(comm)
    mlpint.comm.nccl.own_gpu_each, mlpint.comm.nccl.nccl_transport = found, join
    assert (over.name, over.rank, over.size, over.stall_limit) == ("nccl", comm.rank, comm.size, comm.stall_limit)
    assert over.transport.control.rank == comm.rank and isinstance(over.transport, _core.NcclTransport)
    over.stall_limit = 11.0
    assert comm.transport.stall_limit == over.transport.stall_limit == 11.0
    total = torch.tensor([comm.rank + 1.0])
    over.sum_ordered([total])
    assert float(total) == comm.size * (comm.size + 1) / 2
    over.barrier()


def missing(comm):
    """Where a rank has no NCCL, all do without, and are told why."""
    found, name = mlpint.comm.nccl.own_gpu_each, mlpint.comm.nccl._NAME
    library = os.environ.pop("MLPINT_NCCL")
    mlpint.comm.nccl.own_gpu_each = lambda comm: True
    if comm.rank == comm.size - 1:
        mlpint.comm.nccl._NAME = "libnccl-absent.so.2"
    else:
        mlpint.comm.nccl._candidates = lambda _: [library]
    with warnings.catch_warnings(record=True) as caught:
        assert mlpint.comm.start._over_gpus(comm) is comm
    assert len(caught) == (comm.rank == 0), caught
    if caught:
        text = str(caught[0].message)
        assert f"for want of NCCL on rank {comm.size - 1}: cannot load NCCL" in text and "libnccl-absent" in text, text
    mlpint.comm.nccl.own_gpu_each, mlpint.comm.nccl._NAME, os.environ["MLPINT_NCCL"] = found, name, library
    mlpint.comm.nccl._candidates = CANDIDATES


def outbox(comm):
    """What has left is not kept, also by gloo, which says so only to those who wait."""
    over_nccl = Comm(nccl_transport(comm.transport, comm.device, host_memory=True), "nccl", 0, comm.stall_limit)
    torch.manual_seed(0)  # the same layers on every rank
    blocks = LayerParallel([torch.nn.Linear(2, 2) for _ in range(4)], MGRIT(levels=1), comm=over_nccl)
    for _ in range(100):
        blocks(torch.ones(1, 2)).sum().backward()
    gc.collect()
    alive = sum(type(thing).__name__ == "_Transfer" for thing in gc.get_objects())
    assert alive < 70, alive


class Layer(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x, shift):
        return x + 0.2 * torch.tanh(self.linear(x) + shift)


def stack(comm):
    """LayerParallel over the fake NCCL equals the plain loop over the same modules."""
    t = nccl_transport(comm.transport, comm.device, host_memory=True)
    over_nccl = Comm(t, "nccl", comm.local_rank, comm.stall_limit)
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Layer(6) for _ in range(13)).double()
    layers[11] = layers[1]  # shared by the first and the last rank
    x = numbers(0, 4, 6)
    shift = numbers(1, 6)
    cases = [
        (MGRIT(levels=1), {}),
        (MGRIT(levels=1), {"serial_microbatches": 2}),
        (MGRIT(cfactor=3, forward_iters=5, backward_iters=5), {"recompute": True}),
        (MGRIT(cfactor=2, forward_iters=5, backward_iters=5, relaxation="FCF"), {"open_layers": 1}),
        (MGRIT(levels=3, cfactor=2, forward_iters=7, backward_iters=7), {"close_layers": 2}),
        (MGRIT(cfactor=4, forward_iters=4, backward_iters=4, coarse="identity"), {}),
        (MGRIT(cfactor=2, forward_iters=7, backward_iters=7, tolerance=1e-15), {}),
    ]
    for options, more in cases:
        plain, parallel = copy.deepcopy(layers), copy.deepcopy(layers)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        shift_a, shift_b = shift.clone().requires_grad_(), shift.clone().requires_grad_()
        y = a
        for layer in plain:
            y = layer(y, shift_a)
        y.square().sum().backward()
        blocks = LayerParallel(parallel, options, comm=over_nccl, **more)
        z = blocks(b, shift_b)
        z.square().sum().backward()
        pairs = [(z, y), (b.grad, a.grad), (shift_b.grad, shift_a.grad)]
        for n, layer in blocks.local_layers.items():
            for p, q in zip(layer.parameters(), plain[n].parameters(), strict=True):
                pairs.append((p.grad, q.grad))
        error = max(float((p - q).norm() / q.norm()) for p, q in pairs)
        assert error < 1e-12, (options, more, error)
        for name, value in blocks.state_dict().items():
            assert torch.equal(value, plain.state_dict()[name]), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = init()
    for name in sys.argv[1:]:
        globals()[name](ranks)
        ranks.barrier()
        print(f"rank {ranks.rank}: {name} passed", flush=True)
