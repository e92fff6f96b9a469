"""A mesh of two replicas, of one or two ranks for the layers each, against one process with the whole batch."""

import contextlib
import copy
from unittest import mock

import torch
from layers import Residual, assert_close, copies
from runner import raises, run, shared_folder
from torch import nn
from torch.nn import functional as F

import mlpint
from mlpint import MGRIT, ErrorControl, LayerParallel, checkpoint
from mlpint.control.ladder import exact_options
from mlpint.parallel import data_parallel

EXACT, CONVERGED = MGRIT(levels=1), MGRIT(2, 2, 3, 3)
IGNORED = -100


class Model(nn.Module):
    def __init__(self, depth=6, width=4, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(nn.Sequential(Residual(width), nn.Dropout(dropout)) for _ in range(depth))
        self.head = nn.Linear(width, 11)
        self.unused = nn.Linear(2, 2)

    def states(self, tokens):
        x = self.embedding(tokens)
        if isinstance(self.blocks, LayerParallel):
            return self.blocks(x)
        for block in self.blocks:
            x = block(x)
        return x


def made(comm, options, reference, **more):
    model = copy.deepcopy(reference)
    model.blocks = LayerParallel(model.blocks, options, comm=comm, **more)
    return model


def batch(number, samples=4):
    """Each batch has targets that do not count, an unlike number of them."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 11, (samples, 5), generator=generator)
    targets = torch.randint(0, 11, (samples, 5), generator=generator)
    targets.view(-1)[: number % 7 + 1] = IGNORED
    return tokens, targets


def sharded(model, tokens, targets, comm):
    def head(rows, wanted):
        return F.cross_entropy(model.head(rows), wanted, ignore_index=IGNORED, reduction="sum"), (wanted >= 0).sum()

    return mlpint.shard_loss(head, model.states(tokens), targets, comm=comm)


def compared(comm, options, steps=4, accumulate=1, early=False, **more):
    """Trains both for some steps; gradients, norms, losses and weights are equal to rounding in each."""
    torch.set_default_dtype(torch.float64)
    reference = Model()
    model = made(comm, options, reference, **more)
    pair = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, reference)]
    for step in range(steps):
        total = 0.0
        for m in range(accumulate):
            number = (step * accumulate + m) * comm.data.size
            loss = sharded(model, *batch(number + comm.data.rank), comm)
            total += loss.item() / accumulate
            # A penalty on weights is no part of what the stack's own backward finds.
            penalty = 1e-2 * sum((p**2).sum() for p in model.parameters()) if step == 3 else 0.0
            loss = loss / accumulate + penalty
            last = early and m == accumulate - 1
            with mlpint.averaged_gradients(model) if last else contextlib.nullcontext():
                loss.backward()
        if not early:
            mlpint.average_gradients(model)
        losses = torch.tensor([total])
        comm.data.sum_ordered([losses])

        expected = 0.0
        for m in range(accumulate):
            first = (step * accumulate + m) * comm.data.size
            tokens, targets = map(torch.cat, zip(*map(batch, range(first, first + comm.data.size)), strict=True))
            logits = reference.head(reference.states(tokens)).flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
            penalty = 1e-2 * sum((p**2).sum() for p in reference.parameters()) if step == 3 else 0.0
            (loss / accumulate + penalty).backward()
            expected += loss.item() / accumulate
        assert_close(losses / comm.data.size, torch.tensor([expected]), 1e-12, "loss")
        norms = mlpint.clip_grad_norm_(model, 0.3), nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        assert abs(norms[0] - float(norms[1])) < 1e-11 * norms[0], norms
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    # AdamW divides by what may be nearly nothing, so that a weight may differ by more than its gradient.
    for name, tensor in model.state_dict().items():
        assert_close(tensor, reference.state_dict()[name], 1e-9, name)
    assert mlpint.check_replicas(model, comm) == []


def is_one_process_with_the_whole_batch(comm):
    compared(comm, EXACT)
    compared(comm, CONVERGED)
    compared(comm, EXACT, serial_microbatches=2, accumulate=2)
    begun = []
    finish = data_parallel._EarlySums.finish
    with mock.patch.object(data_parallel._EarlySums, "finish", lambda sums: begun.append(finish(sums)) or begun[-1]):
        compared(comm, CONVERGED, accumulate=2, early=True, chain_slices=2)
    assert [bool(parameters) for parameters in begun] == [True, True, True, False]  # of the penalty it knows nothing
    compared(comm, EXACT, early=True)


def who_is_who(comm):
    world = comm.world
    assert comm.data.size == 2 and comm.size == world.size // 2
    assert world.rank == comm.data.rank * comm.size + comm.rank
    assert mlpint.init() is comm and mlpint.init(data=2) is comm
    raises(ValueError, "already", lambda: mlpint.init(data=1))
    raises(ValueError, "divides", lambda: mlpint.init(data=3))
    raises(ValueError, "divides", lambda: mlpint.init(data=0))
    members = [int(m) for m in comm.gather(str(world.rank).encode())]
    assert members == [r + comm.data.rank * comm.size for r in range(comm.size)], members
    peers = [int(m) for m in comm.data.gather(str(world.rank).encode())]
    assert peers == [comm.rank, comm.rank + comm.size], peers


def replicas_drop_out_other_units(comm):
    layers = [nn.Sequential(Residual(), nn.Dropout(0.5)) for _ in range(4)]
    stack = LayerParallel(layers, EXACT, comm=comm)
    chosen = LayerParallel(layers, EXACT, comm=comm)
    x = torch.ones(2, 4)
    with torch.no_grad():  # the same data for both are refused in training alone
        y = stack(x)
        chosen.dropout_key(3, 5)
        z = chosen(x)
    for tensor, alike in ((y, False), (z, True)):
        others = comm.data.gather(tensor.numpy().tobytes())
        assert (others[0] == others[1]) == alike


def what_would_be_silent_is_refused(comm):
    """The same data for all replicas, gradients that nobody averages, unlike weights."""
    layers = [Residual() for _ in range(4)]
    stack = LayerParallel(copies(layers), EXACT, comm=comm)
    x = torch.randn(3, 4)
    raises(RuntimeError, "the same data", lambda: stack(x))
    with torch.no_grad():
        stack(x)
    own = x + comm.data.rank
    stack = LayerParallel(copies(layers), EXACT, comm=comm)
    optimizer = torch.optim.SGD(stack.parameters(), lr=1e-2)
    stack(own).sum().backward()
    optimizer.step()
    raises(RuntimeError, "average_gradients", lambda: stack(own))

    torch.manual_seed(comm.data.rank)
    unlike = LayerParallel([Residual() for _ in range(4)], EXACT, comm=comm)
    raises(RuntimeError, "unlike weights", lambda: unlike(own))
    sparse = nn.Embedding(5, 4, sparse=True)
    sparse(torch.tensor([comm.rank])).sum().backward()
    raises(ValueError, "sparse", lambda: mlpint.average_gradients(sparse, comm))


def replicas_are_checked_and_made_equal(comm):
    model = made(comm, EXACT, Model())
    if comm.data.rank == 1:
        with torch.no_grad():
            model.head.bias[0] += 1
            for layer in model.blocks.local_layers.values():
                layer[0].outer.bias[1] += 1
    differing = mlpint.check_replicas(model, raises=False)
    assert differing[0] == "head.bias", differing
    assert sorted(differing[1:]) == [f"blocks.{n}.0.outer.bias" for n in range(6)], differing
    mlpint.sync_replicas(model)
    assert mlpint.check_replicas(model) == []


def error_control_decides_for_all(comm):
    """Rungs are the same on all replicas whatever their data, and one that is not finite has all skip the step."""
    layers = [Residual(scale=2.0) for _ in range(8)]
    stack = LayerParallel(layers, MGRIT(2, 2, 1, 1), comm=comm)
    control = ErrorControl(stack, every=2, target=0.9999, patience=1, reference="exact")
    optimizer = torch.optim.SGD(stack.parameters(), lr=1e-3)
    cosines = []
    for step in range(6):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(2 * step + comm.data.rank))
        if step == 3 and comm.data.rank == 1:
            x[0, 0] = torch.nan
        loss = stack(x).square().sum()
        loss.backward()
        mlpint.average_gradients(stack)
        decision = control.step(loss, lambda x=x: stack(x).square().sum())
        assert decision.skip == (step == 3), (step, decision)
        if decision.measured is not None and not decision.skip:
            cosines.append(decision.measured.cosine)
        if not decision.skip:
            optimizer.step()
        optimizer.zero_grad()
        everyone = comm.world.gather(repr((decision.action, decision.after, cosines)).encode())
        assert len(set(everyone)) == 1, everyone
    assert cosines and control.skipped == 1 and mlpint.check_replicas(stack) == []


def measured_over_all_replicas(comm):
    """The cosine is that of the gradients of both batches, one behind the other."""
    torch.set_default_dtype(torch.float64)
    layers = [Residual(scale=1.0) for _ in range(8)]
    options = MGRIT(2, 2, 1, 1)
    stack = LayerParallel(copies(layers), options, comm=comm)
    control = ErrorControl(stack, every=100, target=0.01, reference="exact")
    xs = [torch.randn(4, 4) for _ in range(2)]
    loss = stack(xs[comm.data.rank]).square().sum()
    loss.backward()
    decision = control.step(loss, lambda: stack(xs[comm.data.rank]).square().sum())
    sums = torch.zeros(3)
    alone = LayerParallel(copies(layers), options, comm=comm.data.data)  # a rank by itself
    for x in xs:
        pair = []
        for o in (options, exact_options(options)):
            alone.options = o
            alone.zero_grad()
            alone(x).square().sum().backward()
            pair.append(torch.cat([p.grad.flatten() for p in alone.parameters()]))
        sums += torch.stack([pair[0] @ pair[1], pair[0] @ pair[0], pair[1] @ pair[1]])
    expected = sums[0] / (sums[1] * sums[2]).sqrt()
    assert abs(decision.measured.cosine - float(expected)) < 1e-12, (decision.measured, expected)


def checkpoints_fit_any_mesh(comm):
    reference = Model()
    model = made(comm, CONVERGED, reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model, optimizer, number, comm):
        sharded(model, *batch(number), comm).backward()
        mlpint.average_gradients(model, comm)
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer, comm.data.rank, comm)
    with shared_folder(comm) as folder:
        checkpoint.save(folder, 1, model, optimizer)
        files = sorted(p.name for p in (folder / "step-00000001").iterdir())
        assert files == ["manifest.json", *(f"rank-0000{r}.safetensors" for r in range(comm.size))], files
        again = made(comm, CONVERGED, Model())
        other = torch.optim.AdamW(again.parameters(), lr=1e-2)
        checkpoint.load(folder, again, other)
    for m, o in ((model, optimizer), (again, other)):
        step(m, o, 2 + comm.data.rank, comm)
    theirs = again.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in model.state_dict().items())


def torchs_own_data_parallelism(comm):
    """DDP over the replicas instead; its buckets go out while the backward is still under way."""
    if comm.data.group is None:
        return
    torch.set_default_dtype(torch.float64)
    for options in (EXACT, CONVERGED):
        reference = Model()
        model = made(comm, options, reference)
        model.unused.requires_grad_(False)
        body = nn.parallel.DistributedDataParallel(Wrapped(model, comm), process_group=comm.data.group)
        tokens, targets = batch(comm.data.rank)
        targets = targets.clamp(min=0)
        body(tokens, targets).backward()
        both = [torch.cat(parts) for parts in zip(*(batch(r) for r in range(2)), strict=True)]
        logits = reference.head(reference.states(both[0])).flatten(0, 1)
        F.cross_entropy(logits, both[1].clamp(min=0).flatten()).backward()
        for name, parameter in reference.named_parameters():
            number = name.split(".")[1]
            if name.startswith("blocks.") and int(number) in model.blocks.local_layers:
                own = model.blocks.local_layers[int(number)].get_parameter(name.split(".", 2)[2])
                assert_close(own.grad, parameter.grad, 1e-12, name)
            elif name.startswith(("head", "embedding")):
                assert_close(model.get_parameter(name).grad, parameter.grad, 1e-12, name)


class Wrapped(nn.Module):
    def __init__(self, model, comm):
        super().__init__()
        self.model, self.comm = model, comm

    def forward(self, tokens, targets):
        return sharded(self.model, tokens, targets, self.comm)


def sharded_outside_the_stack(comm):
    """FSDP2 over the replicas for what is not layers; its gradients are its own."""
    if comm.mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    torch.set_default_dtype(torch.float64)
    reference = Model()
    model = made(comm, EXACT, reference)
    for module in (model.embedding, model.head):
        fully_shard(module, mesh=comm.mesh["data"])
    tokens, targets = batch(comm.data.rank)
    targets = targets.clamp(min=0)
    F.cross_entropy(model.head(model.states(tokens)).flatten(0, 1), targets.flatten()).backward()
    mlpint.average_gradients(model)
    both = [torch.cat(parts) for parts in zip(*(batch(r) for r in range(2)), strict=True)]
    logits = reference.head(reference.states(both[0])).flatten(0, 1)
    F.cross_entropy(logits, both[1].clamp(min=0).flatten()).backward()
    for name in ("embedding.weight", "head.weight", "head.bias"):
        assert_close(model.get_parameter(name).grad.full_tensor(), reference.get_parameter(name).grad, 1e-12, name)
    for n, layer in model.blocks.local_layers.items():
        for a, b in zip(layer.parameters(), reference.blocks[n].parameters(), strict=True):
            assert_close(a.grad, b.grad, 1e-12, f"layer {n}")


if __name__ == "__main__":
    run(
        [
            who_is_who,
            is_one_process_with_the_whole_batch,
            replicas_drop_out_other_units,
            what_would_be_silent_is_refused,
            replicas_are_checked_and_made_equal,
            error_control_decides_for_all,
            measured_over_all_replicas,
            checkpoints_fit_any_mesh,
            torchs_own_data_parallelism,
            sharded_outside_the_stack,
        ],
        data=2,
    )
