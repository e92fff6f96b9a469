"""LayerParallel against the unwrapped modules under plain autograd: everything a drop-in has to get right.

The scenarios run on any number of ranks; every rank computes the reference for itself. "exact" options, and MGRIT with
so many iterations that it is exact, must both agree with the loop.
"""

import copy
import dataclasses
import warnings
from functools import partial

import torch
import torch.distributed.checkpoint
from layers import Attention, Residual, assert_close, assert_gradients_equal, copies, plain
from runner import raises, run, shared_folder
from torch import nn

import mlpint
from mlpint import MGRIT, LayerParallel, checkpoint
from mlpint.errors import UserError
from mlpint.nn.random_keys import key

EXACT = MGRIT(cfactor=2, forward_iters=0, backward_iters=0)


def converged(layers, cfactor=2):
    """Options with which MGRIT is exact for so many layers."""
    k = -(-layers // cfactor)
    return MGRIT(cfactor=cfactor, forward_iters=k, backward_iters=k)


def float64(function):
    """Scenarios that compare to rounding run in double precision."""

    def scenario(comm):
        torch.set_default_dtype(torch.float64)
        try:
            function(comm)
        finally:
            torch.set_default_dtype(torch.float32)

    scenario.__name__ = function.__name__
    return scenario


def compare(comm, layers, x, *args, options=None, tolerance=1e-12, extras=(), **kwargs):
    """One forward and backward of the stack and of the loop; x and extras get gradients."""
    for o in [EXACT, converged(len(layers))] if options is None else options:
        reference = copies(layers)
        stack = LayerParallel(copies(layers), o, comm=comm)
        results = []
        for network in (partial(plain, reference), stack):
            leaf = x.clone().requires_grad_()
            own = {e: e.detach().clone().requires_grad_() for e in extras}
            a = [own.get(v, v) if isinstance(v, torch.Tensor) else v for v in args]
            k = {n: own.get(v, v) if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}
            y = network(leaf, *a, **k)
            (y.double() ** 3).sum().backward()
            results.append((y, leaf.grad, *(e.grad for e in own.values())))
        for i, (expected, got) in enumerate(zip(*results, strict=True)):
            assert_close(got, expected, tolerance, f"{o}, output, x, extras: number {i}")
        assert_gradients_equal(stack, reference, tolerance)


@float64
def residual_modules(comm):
    compare(comm, [Residual() for _ in range(7)], torch.randn(3, 4))


@float64
def one_layer(comm):
    compare(comm, [Residual()], torch.randn(3, 4))


@float64
def keyword_arguments_and_masks(comm):
    layers = [Attention() for _ in range(5)]
    mask = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    compare(comm, layers, torch.randn(2, 6, 8), attention_mask=mask)
    compare(comm, layers, torch.randn(2, 6, 8), mask)


@float64
def layers_that_return_tuples(comm):
    compare(comm, [Attention(as_tuple=True) for _ in range(5)], torch.randn(2, 6, 8))


@float64
def extra_tensors_with_gradients(comm):
    bias = torch.randn(1, 6, 8)
    compare(comm, [Attention() for _ in range(5)], torch.randn(2, 6, 8), bias=bias, extras=(bias,))


class TwoStreams(nn.Module):
    """An encoder or decoder layer on the state (X, Y, lengths): moves one of them and hands the others through."""

    def __init__(self, decoder):
        super().__init__()
        self.body, self.decoder = nn.Linear(4, 4), decoder

    def forward(self, state, scale=1.0):
        x, y, lengths = state
        if self.decoder:
            return x, y + scale * torch.tanh(self.body(y + x.mean(1, keepdim=True))) / lengths.sum(), lengths
        return x + scale * torch.tanh(self.body(x)), y, lengths


@float64
def tuples_as_states(comm):
    layers = [TwoStreams(decoder=n >= 3) for n in range(6)]
    state = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.tensor([3, 4])
    for options in (EXACT, converged(6), dataclasses.replace(EXACT, backward_iters=3)):
        reference, stack = copies(layers), LayerParallel(copies(layers), options, comm=comm)
        results = []
        for network in (partial(plain, reference), stack):
            leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in state]
            x, y, lengths = network(tuple(leaves), scale=0.7)
            assert torch.equal(lengths, state[2])
            (x.sin().sum() + (y**2).sum()).backward()
            results.append((x, y, leaves[0].grad, leaves[1].grad))
        for expected, got in zip(*results, strict=True):
            assert_close(got, expected)
        assert_gradients_equal(stack, reference)


@float64
def step_size(comm):
    layers, h = [Residual() for _ in range(6)], 0.25
    reference = copies(layers)
    for options in (EXACT, converged(4)):
        stack = LayerParallel(copies(layers), options, comm=comm, step_size=h, open_layers=1, close_layers=1)
        for layer in reference:
            layer.zero_grad()
        x = torch.randn(3, 4)
        z = x
        for n, layer in enumerate(reference):
            z = layer(z) if n in (0, 5) else z + h * (layer(z) - z)
        z.square().sum().backward()
        y = stack(x)
        y.square().sum().backward()
        assert_close(y, z)
        assert_gradients_equal(stack, reference)


@float64
def gradient_accumulation(comm):
    layers = [Residual() for _ in range(5)]
    for options in (EXACT, converged(5)):
        reference, stack = copies(layers), LayerParallel(copies(layers), options, comm=comm)
        for scale in (1.0, 0.5):
            x = torch.randn(3, 4)
            (plain(reference, x) * scale).square().sum().backward()
            (stack(x) * scale).square().sum().backward()
        assert_gradients_equal(stack, reference)


@float64
def two_forwards_before_one_backward(comm):
    layers = [Residual() for _ in range(5)]
    for options in (EXACT, converged(5)):
        reference, stack = copies(layers), LayerParallel(copies(layers), options, comm=comm)
        a, b = torch.randn(3, 4), torch.randn(2, 4)
        (plain(reference, a).sum() * plain(reference, b).square().sum()).backward()
        (stack(a).sum() * stack(b).square().sum()).backward()
        assert_gradients_equal(stack, reference)
        for layer in (*reference, stack):
            layer.zero_grad()
        (plain(reference, plain(reference, a)) ** 2).sum().backward()  # the stack twice in one graph
        (stack(stack(a)) ** 2).sum().backward()
        assert_gradients_equal(stack, reference)


@float64
def backward_twice_is_refused(comm):
    stack = LayerParallel([Residual() for _ in range(4)], converged(4), comm=comm)
    y = stack(torch.randn(3, 4)).sum()
    y.backward(retain_graph=True)
    try:
        y.backward()
    except RuntimeError as error:
        assert "call the stack again" in str(error)
    else:
        raise AssertionError("a second backward went through freed graphs")


@float64
def gradients_through_autograd_grad(comm):
    layers = [Residual() for _ in range(5)]
    reference, stack = copies(layers), LayerParallel(copies(layers), converged(5), comm=comm)
    x = torch.randn(3, 4, requires_grad=True)
    ours = torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()])
    own = [p for n in stack.local_layers for p in reference[n].parameters()]
    theirs = torch.autograd.grad(plain(reference, x).square().sum(), [x, *own])
    for got, expected in zip(ours, theirs, strict=True):
        assert_close(got, expected)
    assert all(p.grad is None for p in stack.parameters())


@float64
def no_grad_and_eval(comm):
    layers = [Attention(dropout=0.5) for _ in range(5)]
    for options in (EXACT, converged(5)):
        reference, stack = copies(layers), LayerParallel(copies(layers), options, comm=comm)
        stack.eval()
        for layer in reference:
            layer.eval()
        x = torch.randn(2, 6, 8)
        with torch.no_grad():
            y = stack(x)
        assert not y.requires_grad
        assert_close(y, plain(reference, x))
        with torch.inference_mode():
            assert_close(stack(x), y)
        stack(x).sum().backward()  # eval mode with gradients
        plain(reference, x).sum().backward()
        assert_gradients_equal(stack, reference)


def dtypes(comm):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        layers = [Residual().to(dtype) for _ in range(5)]
        compare(comm, layers, torch.randn(3, 4, dtype=dtype), options=[EXACT], tolerance=tolerance)
        compare(comm, layers, torch.randn(3, 4, dtype=dtype), options=[converged(5)], tolerance=tolerance)


def autocast(comm):
    layers = [Attention() for _ in range(5)]
    x = torch.randn(2, 6, 8)
    several = {"cfactor": 2, "forward_iters": 3, "backward_iters": 3}
    for options in (EXACT, MGRIT(**several), MGRIT(**several, coarse="fitted")):
        for recompute in (False, True):
            reference = copies(layers)
            stack = LayerParallel(copies(layers), options, comm=comm, recompute=recompute)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                stack(x).sum().backward()  # a coarse operator learns
            stack.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected, y = plain(reference, x), stack(x)
            assert y.dtype == torch.float32
            expected.square().sum().backward()
            y.square().sum().backward()
            assert_close(y, expected, 0.02)
            assert_gradients_equal(stack, reference, 0.1)
            for layer in stack.local_layers.values():
                for name, p in layer.named_parameters():
                    assert p.grad is not None and p.grad.dtype == torch.float32, name
                    assert p.grad.any() or "in_proj_bias" in name, f"no gradient reached {name}"


@float64
def frozen_parameters(comm):
    layers = [Residual() for _ in range(6)]
    for layer in layers[:3]:
        layer.requires_grad_(False)
    layers[4].inner.bias.requires_grad_(False)
    compare(comm, layers, torch.randn(3, 4))
    stack = LayerParallel(copies(layers), converged(6), comm=comm)
    stack(torch.randn(3, 4)).sum().backward()  # x needs none, and some ranks may have nothing to train
    for n, layer in stack.local_layers.items():
        assert (layer.outer.weight.grad is None) == (n < 3)


@float64
def one_module_shared_by_several_layers(comm):
    shared = Residual()
    compare(comm, [shared, Residual(), shared, shared, Residual(), shared], torch.randn(3, 4))
    compare(comm, [shared] * 5, torch.randn(3, 4))


@float64
def non_contiguous_gradients(comm):
    layers = [Residual() for _ in range(5)]
    x, weight = torch.randn(3, 4), torch.randn(4, 3)
    for options in (EXACT, converged(5)):
        reference, stack = copies(layers), LayerParallel(copies(layers), options, comm=comm)
        leaves = []
        for network in (partial(plain, reference), stack):
            leaf = x.t().contiguous().requires_grad_()
            (network(leaf.t()).t() * weight).sum().backward()
            network(leaf.t()).sum().backward()  # an expanded gradient
            leaves.append(leaf.grad)
        assert_close(leaves[1], leaves[0])
        assert_gradients_equal(stack, reference)


@float64
def batches_of_other_sizes(comm):
    layers = [Residual() for _ in range(5)]
    for options in (EXACT, converged(5)):
        reference, stack = copies(layers), LayerParallel(copies(layers), options, comm=comm)
        for batch in (4, 4, 1, 7):
            x = torch.randn(batch, 4)
            plain(reference, x).square().sum().backward()
            y = stack(x)
            y.square().sum().backward()
            assert y.shape == x.shape
        assert_gradients_equal(stack, reference)


class Tied(nn.Module):
    def __init__(self, blocks, dim):
        super().__init__()
        self.embedding = nn.Embedding(11, dim)
        self.blocks = blocks
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.blocks(x) if isinstance(self.blocks, LayerParallel) else plain(self.blocks, x)
        return self.norm(x) @ self.embedding.weight.t()


@float64
def tied_embeddings_and_training(comm):
    for options in (EXACT, converged(6)):
        torch.manual_seed(3)
        reference = Tied(nn.ModuleList(Residual(8) for _ in range(6)), 8)
        model = copy.deepcopy(reference)
        model.blocks = LayerParallel(model.blocks, options, comm=comm)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (reference, model)]
        for _ in range(5):
            tokens = torch.randint(11, (4, 9))
            norms = []
            for m, optimizer in zip((reference, model), optimizers, strict=True):
                loss = nn.functional.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                if m is reference:
                    norms.append(float(nn.utils.clip_grad_norm_(m.parameters(), 0.3)))
                else:
                    norms.append(mlpint.clip_grad_norm_(m, 0.3))
                optimizer.step()
            assert abs(norms[0] - norms[1]) <= 1e-10 * norms[0], norms
        theirs, ours = reference.state_dict(), model.state_dict()
        assert list(theirs) == list(ours)
        for name in theirs:
            assert_close(ours[name], theirs[name], 1e-9, name)


@float64
def a_head_shared_out_over_the_ranks(comm):
    """Loss and gradients of the whole head; tied and other parameters, tokens that do not divide, ignored targets."""
    embedding, norm, layers = nn.Embedding(300, 64), nn.LayerNorm(64), [Residual(64) for _ in range(5)]
    scale = nn.Parameter(torch.tensor(1.5))
    nets = [(embedding, norm, scale), copy.deepcopy((embedding, norm, scale))]
    stack = LayerParallel(copies(layers), EXACT, comm=comm)
    for shape in (5, 3), (7,), (2, 2, 2), (1,):
        tokens, weights = torch.randint(300, shape), torch.rand(shape)
        wanted = tokens.roll(1, 0)
        wanted[(0,) * len(shape)] = -100 if len(shape) == 2 else 7
        for reduction in "none", "sum":
            results = []
            for emb, ln, factor in nets:
                factor.grad = None
                for module in (emb, ln, stack, *layers):
                    module.zero_grad()
            for (emb, ln, factor), blocks in zip(nets, (partial(plain, layers), stack), strict=True):

                def head(y, targets, w, emb=emb, ln=ln, factor=factor):
                    logits = ln(y) @ emb.weight.T * factor
                    losses = w * nn.functional.cross_entropy(logits, targets, reduction="none")
                    return losses if reduction == "none" else (losses.sum(), (targets >= 0).sum())  # noqa: B023

                y = blocks(emb(tokens))
                if blocks is stack:
                    loss = mlpint.shard_loss(head, y, wanted, weights, comm=comm)
                else:
                    part = head(y.flatten(0, -2), wanted.flatten(), weights.flatten())
                    loss = part.mean() if reduction == "none" else part[0] / part[1]
                (3 * loss).backward()
                results.append((loss, emb.weight.grad, *(p.grad for p in ln.parameters()), factor.grad))
            for expected, got in zip(*results, strict=True):
                assert_close(got, expected, 1e-12, f"{shape}, {reduction}")
            assert_gradients_equal(stack, layers, 1e-12)
    with torch.no_grad():
        assert not mlpint.shard_loss(lambda y: y.sum(-1), stack(emb(tokens)), comm=comm).requires_grad


def what_a_shared_head_refuses(comm):
    stack, linear = LayerParallel([Residual() for _ in range(4)], EXACT, comm=comm), nn.Linear(4, 4)
    y = stack(torch.randn(2, 3, 4))
    for fn, text, more in (
        (lambda y: y.mean(), "a loss for each", {}),
        (lambda y: 3.0, "returns float for", {}),
        (lambda y: nn.functional.dropout(y).sum(-1), "random numbers", {}),
        (lambda own: own.sum(-1) + y.sum(), "otherwise than through y", {}),
        (lambda y: linear(y).sum(-1), "not among those passed", {"parameters": [linear.bias]}),
    ):
        if "otherwise" in text and comm.size == 1:
            continue  # one rank alone has all of the graph
        raises(ValueError, text, partial(mlpint.shard_loss, fn, y, comm=comm, **more))
    mlpint.shard_loss(lambda y: linear(y).sum(-1), y, comm=comm, parameters=linear.parameters()).backward()
    other_shape = torch.ones(3, 2)
    action = partial(mlpint.shard_loss, lambda y, t: y.sum(-1), y, other_shape, comm=comm)
    raises(ValueError, "target 0 is [3, 2]", action)


@float64
def a_factory_makes_a_ranks_own_layers(comm):
    """With the weights of the whole network, whatever the ranks; torch's generator goes on as if nothing had been."""
    made = []

    def make(n):
        made.append(n)
        return Residual(scale=0.1 * (n + 1))

    torch.manual_seed(7)
    factory = mlpint.LayerFactory(7, make)
    x = torch.randn(3, 4)
    stack = LayerParallel(factory, MGRIT(2, 2, 5, 5), comm=comm)
    own = sorted(stack.local_layers)
    assert made == [*own[:1], *own] or made == [0] and not own, (made, own)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    reference = nn.ModuleList(mlpint.LayerFactory(7, make))
    assert torch.equal(x, torch.randn(3, 4)) and torch.equal(drawn, torch.rand(1))
    for n, layer in stack.local_layers.items():
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), reference[n].parameters(), strict=True))
    stack(x).square().sum().backward()
    plain(reference, x).square().sum().backward()
    assert_gradients_equal(stack, reference)
    assert list(stack.state_dict()) == list(reference.state_dict())

    one = Residual()
    bad = [
        (lambda n: "layer", "not a torch.nn.Module"),
        (lambda n: one, "must make a new module"),
        (lambda n: Residual(4 + n), "make all alike"),
    ]
    for make_badly, word in bad:
        factory = mlpint.LayerFactory(7, make_badly)
        raises(ValueError, word, lambda factory=factory: LayerParallel(factory, EXACT, comm=comm))
    LayerParallel(mlpint.LayerFactory(7, lambda n: Residual(4 + n), alike=False), EXACT, comm=comm)
    generator = torch.Generator()

    def unseeded(n):
        layer = Residual()
        nn.init.normal_(layer.inner.weight, generator=generator)
        return layer

    raises(ValueError, "does not govern", lambda: LayerParallel(mlpint.LayerFactory(7, unseeded), EXACT, comm=comm))
    raises(ValueError, "layers = 0", lambda: mlpint.LayerFactory(0, make))
    unlike = mlpint.LayerFactory(7, make, seed=comm.rank)
    if comm.size > 1:
        raises(ValueError, "the ranks disagree", lambda: LayerParallel(unlike, EXACT, comm=comm))


@float64
def the_whole_goes_to_the_first_rank_alone(comm):
    """In host memory, and from there into torch's own kind of checkpoint."""
    reference = nn.Sequential(nn.Linear(4, 4), nn.ModuleList(Residual() for _ in range(5)), nn.BatchNorm1d(4))
    model = copy.deepcopy(reference)
    model[1] = LayerParallel(model[1], MGRIT(2, 2), comm=comm)
    state = checkpoint.gather(model)
    if comm.rank == 0:
        assert list(state) == list(reference.state_dict())
        assert all(torch.equal(state[name], t) for name, t in reference.state_dict().items())
    else:
        assert state == {}
    assert len(model.state_dict()) == len(reference.state_dict())  # elsewhere it is everybody's
    with shared_folder(comm) as folder:
        checkpoint.export(model, folder / "dcp")
        if comm.rank == 0:
            other = copy.deepcopy(reference)
            for parameter in other.parameters():
                nn.init.zeros_(parameter)
            torch.distributed.checkpoint.load(other.state_dict(), checkpoint_id=folder / "dcp", no_dist=True)
            for name, tensor in reference.state_dict().items():
                assert torch.equal(other.state_dict()[name], tensor), name
        comm.barrier()
        (folder / "file").touch()
        raises(UserError, "file", lambda: checkpoint.export(model, folder / "file" / "below"))


@float64
def clipping_counts_shared_modules_once(comm):
    shared = Residual()
    layers = [shared, Residual(), Residual(), shared]
    reference, stack = copies(layers), LayerParallel(copies(layers), EXACT, comm=comm)
    x = torch.randn(3, 4)
    plain(reference, x).square().sum().backward()
    stack(x).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(nn.ModuleList(reference).parameters(), 0.1)
    assert_close(torch.tensor(mlpint.clip_grad_norm_(stack, 0.1)), expected)
    assert_gradients_equal(stack, reference, 1e-5)


def keyed_loop(layers, x, seed, step, microbatch):
    """The unwrapped layers, each under the dropout key that the stack promises."""
    for n, layer in enumerate(layers):
        torch.manual_seed(key(seed, step, microbatch, n))
        x = layer(x)
    return x


@float64
def dropout(comm):
    layers = [Attention(dropout=0.3) for _ in range(6)]
    x = torch.randn(2, 6, 8)
    for options in (EXACT, converged(6), MGRIT(levels=3, cfactor=2, forward_iters=3, backward_iters=3)):
        for recompute in (False, True):
            reference = copies(layers)
            stack = LayerParallel(copies(layers), options, comm=comm, recompute=recompute)
            outputs = []
            for step, microbatch in ((5, 0), (5, 1), (6, 0)):
                torch.manual_seed(99)
                expected = keyed_loop(reference, x, stack.layer_random.seed, step, microbatch)
                torch.manual_seed(17)
                state = torch.get_rng_state()
                stack.dropout_key(step, microbatch)
                y = stack(x)
                assert torch.equal(torch.get_rng_state(), state), "the user's random numbers were moved"
                expected.square().sum().backward()
                y.square().sum().backward()
                assert torch.equal(torch.get_rng_state(), state), "the user's random numbers were moved"
                assert_close(y, expected, what=f"{options}, recompute {recompute}, step {step}")
                outputs.append(y)
            assert_gradients_equal(stack, reference)
            assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
            assert not torch.equal(stack(x), stack(x)), "passes without a key must differ"


@float64
def masks_do_not_depend_on_iterations(comm):
    """Inexact iterations: the masks are the same in every relaxation, so the last sweep is the layers' own."""
    layers = [Attention(dropout=0.3) for _ in range(6)]
    x = torch.randn(2, 6, 8)
    stack = LayerParallel(copies(layers), MGRIT(cfactor=3, forward_iters=2, backward_iters=2), comm=comm)
    alone = LayerParallel(copies(layers), stack.options, comm=mlpint.comm.Comm.of(None) if comm.size == 1 else one())
    alone.layer_random.seed = stack.layer_random.seed
    ys = []
    for network in (stack, alone):
        network.dropout_key(4)
        y = network(x)
        y.square().sum().backward()
        ys.append(y)
    assert torch.equal(ys[0], ys[1]), "another number of ranks, another result"
    for n, layer in stack.local_layers.items():
        for p, q in zip(layer.parameters(), alone.local_layers[n].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def one():
    """A Comm of this process alone, inside a job of several."""
    from mlpint import _core

    return mlpint.Comm(_core.SelfTransport(), "self", 0, 60.0)


@float64
def recompute(comm):
    layers = [Residual() for _ in range(7)]
    for options in (EXACT, converged(7), MGRIT(cfactor=3, forward_iters=1, backward_iters=1)):
        x = torch.randn(3, 4)
        stacks = [LayerParallel(copies(layers), options, comm=comm, recompute=r) for r in (False, True)]
        for stack in stacks:
            stack(x).square().sum().backward()
        for n, layer in stacks[0].local_layers.items():
            for p, q in zip(layer.parameters(), stacks[1].local_layers[n].parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)


@float64
def deep_copies(comm):
    stack = LayerParallel([Residual() for _ in range(5)], converged(5), comm=comm)
    x = torch.randn(3, 4)
    before = stack(x)
    clone = copy.deepcopy(nn.Sequential(stack))[0]
    assert clone.comm is stack.comm
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(1.0)
    assert torch.equal(clone(x), before)
    clone(x).sum().backward()
    assert all(p.grad is None for p in stack.parameters())
    assert all(p.grad is not None for p in clone.parameters())


@float64
def state_dicts(comm):
    layers = nn.ModuleList(Residual() for _ in range(7))
    fresh = nn.ModuleList(Residual() for _ in range(7))
    stack = LayerParallel(copies(layers), EXACT, comm=comm)
    ours, theirs = stack.state_dict(), layers.state_dict()
    assert list(ours) == list(theirs)
    fresh.load_state_dict(ours)  # into the unwrapped model, strictly
    other = LayerParallel([Residual() for _ in range(7)], MGRIT(cfactor=4, levels=3), comm=comm)
    other.load_state_dict(theirs)  # from the unwrapped model, cut up differently
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, theirs[name]) and torch.equal(fresh.state_dict()[name], tensor)
    for wrong in ({**theirs, "7.inner.weight": torch.zeros(4, 4)}, {**theirs, "extra": torch.zeros(1)}):
        try:
            other.load_state_dict(wrong)
        except RuntimeError as error:
            assert "Unexpected key" in str(error)
        else:
            raise AssertionError("a key of no layer was taken")


@float64
def pipelined_exact_sweeps(comm):
    layers = [Attention() for _ in range(5)]
    bias, x = torch.randn(5, 1, 8), torch.randn(5, 6, 8)
    for count in (2, 3, 9):
        reference = copies(layers)
        stack = LayerParallel(copies(layers), EXACT, comm=comm, serial_microbatches=count)
        results = []
        for network in (partial(plain, reference), stack):
            leaf, extra = x.clone().requires_grad_(), bias.clone().requires_grad_()
            y = network(leaf, bias=extra)
            y.square().sum().backward()
            results.append((y, leaf.grad, extra.grad))
        for expected, got in zip(*results, strict=True):
            assert_close(got, expected)
        assert_gradients_equal(stack, reference)


@float64
def options_replaced_between_steps(comm):
    layers = [Residual() for _ in range(13)]
    reference, stack = copies(layers), LayerParallel(copies(layers), MGRIT(cfactor=4), comm=comm)
    x = torch.randn(3, 4)
    for options in (converged(13, 3), EXACT, converged(13, 5), MGRIT(levels=1), converged(13, 2)):
        for layer in (*reference, stack):
            layer.zero_grad()
        stack.options = options
        plain(reference, x).square().sum().backward()
        stack(x).square().sum().backward()
        assert_gradients_equal(stack, reference)


@float64
def idle_ranks_are_reported(comm):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stack = LayerParallel([Residual() for _ in range(5)], MGRIT(cfactor=4), comm=comm)
    warned = [str(w.message) for w in caught if "own none of the 5 layers" in str(w.message)]
    assert len(warned) == (comm.rank == 0 and comm.size > 2), warned
    assert stack.layout.idle_ranks == list(range(2, comm.size))
    owners = sorted(n for r in range(comm.size) for n in range(5) if stack.rank_of(n) == r)
    assert owners == list(range(5)), "each layer exactly once"


@float64
def operators_that_the_ranks_do_not_allow(comm):
    """sum evaluates all layers of an interval where the first is."""
    stack = LayerParallel([Residual() for _ in range(8)], MGRIT(cfactor=2, coarse="sum"), comm=comm)
    stack(torch.randn(3, 4))
    stack.options = MGRIT(cfactor=5, coarse="sum")
    border_inside = any(stack.rank_of(p) != stack.rank_of(p + 4) for p in (0,))
    try:
        stack(torch.randn(3, 4))
    except ValueError as error:
        assert border_inside and "take the cfactor the stack was made with" in str(error), error
    else:
        assert not border_inside


@float64
def layers_that_change_shape_or_dtype(comm):
    class Wrong(Residual):
        def __init__(self, how):
            super().__init__()
            self.how = how

        def forward(self, x):
            return self.how(super().forward(x))

    if comm.size > 1:
        return  # the error is one rank's; tests/test_guard.py has what it does to the others
    for how, text in (
        (lambda x: x[..., :2], "layer 2 turned 3x4 float64 cpu into 3x2 float64 cpu"),
        (lambda x: x.float(), "into 3x4 float32 cpu"),
        (lambda x: {"x": x}, "layer 2 returned dict"),
        (lambda x: None, "layer 2 returned NoneType"),
    ):
        for options in (EXACT, converged(4)):
            stack = LayerParallel([Residual(), Residual(), Wrong(how), Residual()], options, comm=comm)
            try:
                stack(torch.randn(3, 4))
            except ValueError as error:
                assert text in str(error), error
            else:
                raise AssertionError(f"no error for {text}")


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
