"""Multilevel training of stacks that are spread over ranks, against the same on one process."""

import torch
from layers import assert_close
from runner import run, shared_folder
from torch import nn

import mlpint
from mlpint import MGRIT, LayerParallel, Multilevel, checkpoint
from mlpint.nn import BlockStack

D, LAYERS = 8, 8
STOP = 7  # fine A A B B fine A | A B B
EXACT, INEXACT = MGRIT(levels=1), MGRIT(cfactor=2, forward_iters=1, backward_iters=1, coarse="fitted")


class Model(nn.Module):
    """What lies outside the blocks comes after them, so that weights shared by all networks are trained too."""

    def __init__(self, blocks):
        super().__init__()
        torch.manual_seed(3)
        self.blocks, self.head = blocks, nn.Linear(D, 3).double()

    def forward(self, x):
        return self.head(self.blocks(x))


def stack(dropout=0.0):
    torch.manual_seed(1)
    blocks = BlockStack(LAYERS, D, 2, ffn=12, dropout=dropout).double()
    for p in blocks.parameters():
        nn.init.normal_(p, std=0.2)
    return blocks


def wrapped(comm, kind, options, dropout=0.0, **more):
    blocks = stack(dropout)
    return Model(LayerParallel(blocks if kind == "stack" else blocks.to_blocks(), options, comm=comm, **more))


def data(i):
    return torch.randn(3, 4, D, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def train(model, multilevel, optimizer, total=2, stop=None):
    losses = []
    for phase in multilevel.schedule(total):
        if multilevel.steps_done == stop:
            break
        with phase:
            loss = model(data(phase.batch_index)).square().mean()
            phase.loss(loss)
            loss.backward()
            mlpint.clip_grad_norm_(model, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def start(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    options = {"cycles": 2, "coarse_steps": 2} | options
    return optimizer, Multilevel(model.blocks, optimizer, model=model, **options)


def compare(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, 1e-9, name)


def ranks_train_like_one_process(comm):
    """Exact sweeps, with clipping, over blocks and stacked blocks; no weight leaves its rank."""
    deep = {"levels": 3, "cycles": (1, 1), "coarse_steps": (2, 2)}
    for options in ({"state": "restrict", **deep}, {"state": "carry", "cycles": "auto", "window": 2}):
        alone = Model(stack().to_blocks())
        alone.blocks = nn.Sequential(*alone.blocks)
        optimizer, reference = start(alone, **options)
        expected = train(alone, reference, optimizer)
        for kind in ("list", "stack"):
            model = wrapped(comm, kind, EXACT)
            places = {name: p.data_ptr() for name, p in model.named_parameters()}
            optimizer, multilevel = start(model, **options)
            losses = train(model, multilevel, optimizer)
            assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-10
            compare(model, alone)
            if kind == "stack":
                assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
            if model.blocks.layout.local_indices(comm.rank):
                assert multilevel.flops.all == reference.flops.all
            assert not mlpint.check_replicas(model, comm)


def any_number_of_ranks_goes_on_from_the_middle_of_a_cycle(comm):
    """Bit-equally, with inexact sweeps, coarse operators that have learnt, and dropout."""
    for kind, options in (("list", {"state": "restrict"}), ("stack", {"state": "carry"})):
        uninterrupted = wrapped(comm, kind, INEXACT, dropout=0.1)
        optimizer, multilevel = start(uninterrupted, **options)
        expected = train(uninterrupted, multilevel, optimizer)

        model = wrapped(comm, kind, INEXACT, dropout=0.1)
        optimizer, multilevel = start(model, **options)
        losses = train(model, multilevel, optimizer, stop=STOP)
        assert losses == expected[:STOP]
        with shared_folder(comm) as directory:
            saved = multilevel.state_dict()
            info = {"multilevel": saved["info"], "calls": model.blocks.pass_keys.passes}
            checkpoint.save(directory, STOP, model, optimizer, info=info, extra=saved["tensors"], comm=comm)

            model = wrapped(comm, kind, INEXACT, dropout=0.1)
            optimizer, multilevel = start(model, **options)
            opened = checkpoint.load(directory, model, optimizer, comm=comm)
            multilevel.load_state_dict({"info": opened.info["multilevel"], "tensors": opened.extra(multilevel.wants)})
            model.blocks.pass_keys.passes = opened.info["calls"]
            assert train(model, multilevel, optimizer) == expected[STOP:], kind
            ours, theirs = model.state_dict(), uninterrupted.state_dict()
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

            # One process alone takes it up as well.
            alone = wrapped(mlpint.Comm.of(None) if comm.size == 1 else lone(), kind, INEXACT, dropout=0.1)
            optimizer, multilevel = start(alone, **options)
            opened = checkpoint.load(directory, alone, optimizer, comm=alone.blocks.comm)
            multilevel.load_state_dict({"info": opened.info["multilevel"], "tensors": opened.extra(multilevel.wants)})
            alone.blocks.pass_keys.passes = opened.info["calls"]
            again = train(alone, multilevel, optimizer)
            assert max(abs(a - b) for a, b in zip(again, expected[STOP:], strict=True)) < 1e-9


def lone():
    from mlpint.comm.start import alone

    return alone(60.0)


def coarse_phases_with_open_and_close_layers(comm):
    options = {"open_layers": 1, "close_layers": 1, "step_size": 0.5}
    model = wrapped(comm, "list", MGRIT(cfactor=2, forward_iters=2, backward_iters=1), **options)
    blocks, solver = stack().to_blocks(), model.blocks.options
    chosen = {"A": [0, 2, 4, 6, 7], "B": [0, 1, 3, 5, 7]}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for phase in Multilevel(model.blocks, optimizer, cycles=1, coarse_steps=1).schedule(1):
        with phase:
            y = model.blocks(data(0))
        if not phase.fine:
            options["step_size"] = 1.0
            alone = LayerParallel([blocks[n] for n in chosen[phase.name]], solver, comm=lone(), **options)
            assert_close(y, alone(data(0)), 1e-12, phase.name)


def what_ranks_cannot_do_is_refused(comm):
    def refuses(what, **more):
        options = {name: more.pop(name) for name in ("neighbours", "delta") if name in more}
        model = wrapped(comm, "list", EXACT, **more)
        try:
            start(model, **options)
        except ValueError as error:
            assert what in str(error), error
        else:
            raise AssertionError(f"not refused: {what}")

    if comm.size > 1:
        refuses("delta=0.5", delta=0.5 if comm.rank else 0.25)
    if comm.size == 3:  # layers 0-2, 3-5, 6-7; the middle ones 2-3, 4, 5
        refuses("which is another rank's; pass neighbours='none'", neighbours="average")
        refuses("has no layer on rank 2", open_layers=2, close_layers=2)


if __name__ == "__main__":
    run(
        [
            f
            for f in list(globals().values())
            if callable(f)
            and getattr(f, "__code__", None) is not None
            and f.__code__.co_varnames[:1] == ("comm",)
            and f.__code__.co_argcount == 1
        ]
    )
