"""Other uses of a stack than the plain one: each is right, refused, or warned of; none is silently wrong.

The list is docs/uses.md. The scenarios run on any number of ranks; every rank computes the reference for itself.
"""

import copy
import functools
import io
import itertools
import pickle
import random
import re
import tempfile
import threading
import time
import warnings

import torch
from drop_in import EXACT, converged, float64
from layers import Residual, assert_close, assert_gradients_equal, copies, plain
from runner import run
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import mlpint
from mlpint import MGRIT, LayerParallel

BOTH = EXACT, converged(6)


def made(comm, layers, options=EXACT, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks .* own none")
        return LayerParallel(copies(layers), options, comm=comm, **kwargs)


def refused(comm, pattern, function, kinds=(RuntimeError, ValueError, TypeError)):
    """Some rank must raise, with a text that says what the matter is, and every rank must get here."""
    text = ""
    try:
        function()
    except kinds as error:
        text = str(error)
    texts = [m.decode() for m in comm.gather(text.encode())]
    assert any(re.search(pattern, t) for t in texts), texts
    return texts


def warned(comm, pattern, function):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        function()
    texts = [m.decode() for m in comm.gather("\n".join(str(s.message) for s in said).encode())]
    assert any(re.search(pattern, t) for t in texts), texts


def same(stack, reference, x, tolerance=1e-11):
    for parameter in (*stack.parameters(), *nn.ModuleList(reference).parameters()):
        parameter.grad = None
    a, b = plain(reference, x), stack(x)
    (a**3).sum().backward()
    (b**3).sum().backward()
    assert_close(b, a, tolerance, "output")
    assert_gradients_equal(stack, reference, tolerance)


# --- layers that change after wrapping -------------------------------------------------------------------------------


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.linspace(-1, 1, base.in_features))
        self.up = nn.Parameter(torch.full((base.out_features,), 0.1))

    def forward(self, x):
        return self.base(x) + (x @ self.down)[..., None] * self.up


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.tensor(1.5))

    def forward(self, w):
        return self.s * w


def adapter(layer):
    layer.requires_grad_(False)
    layer.inner = Adapted(layer.inner)


def adapter_in_modules(layer):
    layer._modules["outer"] = Adapted(layer.outer)


def new_linear(layer):
    layer.inner = copy.deepcopy(layer.inner)


def parametrization(layer):
    parametrize.register_parametrization(layer.inner, "weight", Scaled())


def pruned(layer):
    prune.l1_unstructured(layer.inner, "weight", 0.5)


def unfrozen(layer):
    layer.inner.requires_grad_(not layer.inner.weight.requires_grad)


@float64
def layers_change_after_wrapping(comm):
    x = torch.randn(3, 4)
    for change in (adapter, adapter_in_modules, new_linear, parametrization, pruned, unfrozen):
        for options in BOTH:
            reference = [Residual() for _ in range(6)]
            stack = made(comm, reference, options)
            same(stack, reference, x)
            for layer in (*reference, *stack.local_layers.values()):
                change(layer)
            same(stack, reference, x)
            if change is unfrozen:
                for layer in (*reference, *stack.local_layers.values()):
                    change(layer)
                same(stack, reference, x)


@float64
def a_whole_layer_is_replaced(comm):
    x = torch.randn(3, 4)
    for options in BOTH:
        reference = [Residual() for _ in range(6)]
        stack = made(comm, reference, options)
        same(stack, reference, x)
        reference[3] = Adapted(nn.Linear(4, 4))
        setattr(stack, "3", copy.deepcopy(reference[3]))
        assert ("3" in dict(stack.named_children())) == (3 in stack.local_layers)
        if 3 in stack.local_layers:
            assert stack.local_layers[3] is stack.get_submodule("3")
        same(stack, reference, x)
        refused(comm, "layer 6 of a stack of 6 layers", lambda: setattr(stack, "6", Residual()), AttributeError)  # noqa: B023

    def assign():
        stack.local_layers[3] = Residual()

    refused(comm, "item assignment", assign)
    for use in (lambda: [layer(x) for layer in stack], lambda: stack[0], lambda: stack[1:]):
        refused(comm, "is called", use, TypeError)
    blocks = LayerParallel(mlpint.nn.BlockStack(4, 8, 2), MGRIT(cfactor=2), comm=comm)
    for name in "stacked", "1":
        refused(comm, "stacked|blocks", functools.partial(setattr, blocks, name, Residual()), AttributeError)


@float64
def a_shared_module_gets_an_adapter(comm):
    layer = Residual()
    stack = made(comm, [layer] * 6)
    x = torch.randn(3, 4)
    stack(x).sum().backward()
    adapter(next(iter(stack.local_layers.values()), layer))
    if comm.size == 1:
        stack(x).sum().backward()
    elif all(stack.layout.local_indices(r) for r in range(comm.size)):
        refused(comm, "several ranks share", lambda: stack(x))


# --- what layers do beside returning their state ---------------------------------------------------------------------


class Leaving(Residual):
    """Leaves a loss in one of several places."""

    def forward(self, x, place=None, attribute=False):
        y = super().forward(x)
        if isinstance(place, list):
            place.append(y.sum())
        elif isinstance(place, dict):
            place["loss"] = y.sum()
        elif isinstance(place, torch.Tensor):
            place.add_(1)
        elif place is not None:
            place.losses.append(y.sum())
        if attribute:
            self.loss = y.square().sum()
        return y


class Bag:
    def __init__(self):
        self.losses = []


@float64
def layers_fill_their_arguments(comm):
    x = torch.randn(3, 4)
    for options in BOTH if comm.size > 1 else BOTH[1:]:
        for place in ([], {}, Bag()):
            stack = made(comm, [Leaving() for _ in range(6)], options)
            for text in refused(comm, "changes its argument place", lambda s=stack, p=place: s(x, place=p)):
                assert "[mlpint]" in text
            stack(x)
    # Lists and dictionaries that nobody fills are no hindrance.
    stack = made(comm, [Residual2() for _ in range(6)], converged(6))
    stack(x, {"mask": [torch.ones(2), 3]}).sum().backward()


class Residual2(Residual):
    def forward(self, x, unused):
        return super().forward(x)


@float64
def a_loss_kept_in_an_attribute(comm):
    stack, x = made(comm, [Leaving() for _ in range(6)], converged(6)), torch.randn(3, 4)
    y = stack(x, attribute=True)
    if comm.size == 1:  # with more ranks the error ends the job, as it should
        loss = y.sum() + sum(layer.loss for layer in stack.local_layers.values())
        refused(comm, "has kept|second time", loss.backward)


# --- random numbers --------------------------------------------------------------------------------------------------


class Dropping(Residual):
    def __init__(self, p=0.0):
        super().__init__()
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return x + 0.3 * self.drop(torch.tanh(self.inner(x)))


class Sometimes(Residual):
    """Draws where the batch says so, and skips itself at random (stochastic depth)."""

    def forward(self, x):
        if (x[:, 0] <= 0).all():
            return super().forward(x)
        return x + 0.3 * torch.bernoulli(torch.full_like(x, 0.6)) * torch.tanh(self.inner(x)) * (torch.rand(()) > 0.3)


def one_mask(stack, x):
    """A key gives one value, and the gradient is that of this value."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def value(t):
        stack.dropout_key(7)
        return stack(t).square().mean()

    leaf = x.clone().requires_grad_()
    first = value(leaf)
    first.backward()
    torch.rand(5)  # the user's own random numbers go on
    with torch.no_grad():
        slope = (value(x + 1e-5 * v) - value(x - 1e-5 * v)) / 2e-5
        assert abs(value(x) - first.detach()) < 1e-12
    assert abs(slope - (leaf.grad * v).sum()) < 1e-6 * abs(slope)


@float64
def dropout_is_switched_on_later(comm):
    x = torch.randn(4, 4)
    for options in BOTH:
        stack = made(comm, [Dropping() for _ in range(6)], options)
        stack(x).sum().backward()
        for layer in stack.local_layers.values():
            layer.drop.p = 0.5
        state = torch.get_rng_state()
        assert not torch.equal(stack(x), stack(x))
        assert torch.equal(torch.get_rng_state(), state)
        one_mask(stack, x)
        stack = made(comm, [Sometimes() for _ in range(6)], options)
        stack(-x.abs()).sum().backward()
        one_mask(stack, x.abs())


@float64
def evaluation_leaves_the_masks_of_training_alone(comm):
    layers, x = [Dropping(0.5) for _ in range(6)], torch.randn(4, 4)
    for options in BOTH:
        results = []
        for evaluations in (0, 2):
            torch.manual_seed(3)
            stack = made(comm, layers, options)
            for _ in range(2):
                y = stack(x)
                stack.eval()
                for _ in range(evaluations):
                    stack(x)
                stack.train()
            results.append(y)
        assert torch.equal(*results)


class Jumpy(Residual):
    def forward(self, x):
        return super().forward(x) * (1 + 0 * random.random())


def random_numbers_of_python(comm):
    stack = made(comm, [Jumpy() for _ in range(6)], converged(6))
    warned(comm, "draws random numbers from Python", lambda: stack(torch.randn(3, 4)))


# --- autograd --------------------------------------------------------------------------------------------------------


@float64
def an_output_without_gradient_says_so(comm):
    x = torch.randn(3, 4)
    for options in BOTH:
        stack = made(comm, [Residual() for _ in range(6)], options)
        stack.requires_grad_(False)
        assert not stack(x).requires_grad
        assert stack(x.clone().requires_grad_()).requires_grad
        if 5 in stack.local_layers:  # one layer on one rank
            stack.local_layers[5].requires_grad_(True)
        y = stack(x)
        assert y.requires_grad
        y.sum().backward()


@float64
def inference_mode(comm):
    reference, x = [Residual() for _ in range(6)], torch.randn(3, 4)
    for options in BOTH:
        stack = made(comm, reference, options)
        with torch.inference_mode():
            assert_close(stack(x.clone()), plain(reference, x), 1e-12)


@float64
def weights_change_before_the_backward(comm):
    for options in BOTH[(comm.size == 1) :]:
        stack = made(comm, [Residual() for _ in range(6)], options)
        y = stack(torch.randn(3, 4))
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter.add_(0.5)
        if all(stack.layout.local_indices(r) for r in range(comm.size)):
            refused(comm, "changed in place", y.sum().backward)


class Part(nn.Module):
    """What is inside the checkpoint: the stack between dropout and a head."""

    def __init__(self, stack, p):
        super().__init__()
        self.outer, self.stack, self.head = nn.Dropout(p), stack, nn.Linear(4, 4)

    def forward(self, x):
        return torch.sin(self.head(self.stack(self.outer(x))))


@float64
def a_checkpoint_around_the_stack(comm):
    """Two microbatches, so that the backward runs two passes again."""
    for p, options, reentrant in itertools.product((0.0, 0.4), BOTH, (True, False)):
        part = Part(made(comm, [Dropping(p) for _ in range(6)], options), p)
        inputs, results = [torch.randn(3, 4, requires_grad=True) for _ in range(2)], []
        for saving in (False, True):
            part.zero_grad()
            torch.manual_seed(9)
            total = torch.zeros(())
            for i, x in enumerate(inputs):
                x.grad = None
                part.stack.dropout_key(5, i)
                y = checkpoint(part, x, use_reentrant=reentrant) if saving else part(x)
                total = total + (i + 1) * y.square().sum()
            total.backward()
            results.append([total, part.head.weight.grad, *(x.grad for x in inputs)])
        for number, (ours, theirs) in enumerate(zip(*results, strict=True)):
            assert_close(ours, theirs, 1e-12, f"p {p}, {options}, reentrant {reentrant}, number {number}")


# --- the model around ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, 4), nn.ModuleList(layers), nn.Linear(4, 4)

    def forward(self, x):
        x = self.embed(x)
        x = self.blocks(x) if isinstance(self.blocks, LayerParallel) else plain(self.blocks, x)
        return self.head(x)


def nets(comm, options=EXACT, tie=False):
    reference = Net([Residual() for _ in range(6)])
    if tie:
        reference.head.weight = reference.blocks[2].inner.weight
    model = copy.deepcopy(reference)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks .* own none")
        model.blocks = LayerParallel(model.blocks, options, comm=comm)
    return reference, model


@float64
def a_parameter_tied_to_the_outside(comm):
    reference, model = nets(comm, tie=True)
    x = torch.randn(3, 4)
    if comm.size > 1:
        texts = refused(comm, "2.inner.weight", lambda: model(x))
        assert all("used outside" in t for t in texts)
        # Beside another thread modules are found in another way.
        model, ended = nets(comm, tie=True)[1], threading.Event()
        thread = threading.Thread(target=ended.wait)
        thread.start()
        try:
            refused(comm, "2.inner.weight", lambda: model(x))
        finally:
            ended.set()
            thread.join()
    else:
        reference(x).sum().backward()
        model(x).sum().backward()
        assert_close(model.head.weight.grad, reference.head.weight.grad)


@float64
def copies_and_pickles(comm):
    reference, model = nets(comm)
    x = torch.randn(3, 4)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x)) and again.blocks.comm is model.blocks.comm
    for way in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        assert all("state_dict" in t for t in refused(comm, "state_dict", lambda w=way: w(model)))
    reference.load_state_dict(model.state_dict())


def another_default_device(comm):
    layers, x = [Residual() for _ in range(6)], torch.randn(3, 4)
    torch.set_default_device("meta")
    try:
        for options in (*BOTH, mlpint.MGRIT(2, 2, 3, 3, coarse="fitted")):
            stack = made(comm, layers, options)
            stack(x).sum().backward()
            mlpint.clip_grad_norm_(stack, 1.0)
            stack.state_dict()
    finally:
        torch.set_default_device("cpu")


def ranks_that_differ(comm):
    if comm.size == 1:
        return
    torch.manual_seed(comm.rank)
    stack = made(comm, [Residual() for _ in range(6)])
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    assert all("unlike weights" in t for t in refused(comm, "seed all ranks alike", lambda: stack(x)))
    stack.load_state_dict(nn.ModuleList(Residual() for _ in range(6)).state_dict())
    stack(x)
    # Other batches, of the same norm to the bit.
    texts = refused(comm, "differs from rank to rank", lambda: stack(x if comm.rank else x.flip(0)))
    assert all("same batch" in t for t in texts)


def a_scaler_of_losses(comm):
    """Gradients overflow in the layers of one rank: all skip the step."""

    _, model = nets(comm)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=16.0)
    if 5 in model.blocks.local_layers:
        layer = model.blocks.local_layers[5]
        layer.forward = lambda x: x + torch.tanh(nn.functional.linear(x, Infinite.apply(layer.inner.weight)))
    scaler.scale(model(torch.randn(3, 4)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0
    assert not mlpint.check_replicas(model, comm)


class Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.view_as(w)

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


# --- microbatches, buffers -------------------------------------------------------------------------------------------


class Masked(Residual):
    def forward(self, x, mask):
        weights = (x @ x.transpose(-1, -2)).masked_fill(mask, -1e9).softmax(-1)
        return x + 0.3 * torch.tanh(self.inner(weights @ x))


@float64
def a_mask_of_as_many_tokens_as_sequences(comm):
    for size in (2, 4):
        reference, x = [Masked() for _ in range(6)], torch.randn(size, size, 4)
        mask = torch.triu(torch.ones(size, size, dtype=torch.bool), 1)
        stack = made(comm, reference, serial_microbatches=2)
        assert_close(stack(x, mask), plain(reference, x, mask))
        rows = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1).expand(size, 3, 3)
        x = torch.randn(size, 3, 4)
        if size != 4:
            assert_close(stack(x, rows), plain(reference, x, rows))  # cut along
    layers = [nn.TransformerEncoderLayer(4, 2, 8, 0.0) for _ in range(6)]
    stack = made(comm, layers, serial_microbatches=2)
    refused(comm, "batch_first=True", lambda: stack(torch.randn(5, 2, 4)))


def layers_that_mix_samples(comm):
    """Centring over the batch: no slices. Which of several layers does it, and on which rank, is all one."""

    class Centring(Residual):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    options, x = MGRIT(2, 2, 1, 1), torch.randn(4, 4)
    for training in True, False:
        layers = [*(Residual() for _ in range(7)), Centring()]
        exact = made(comm, layers, EXACT, serial_microbatches=2).train(training)
        refused(comm, f"rank {comm.size - 1} mix its samples", functools.partial(exact, x))
        stack = made(comm, layers, options, chain_slices=2).train(training)
        if comm.size > 1:
            refused(comm, "mix its samples", functools.partial(stack, x))
        else:
            stack(x)  # nobody waits for a chain, so that it is whole
        assert_close(made(comm, layers, EXACT, chain_slices=1)(x), plain(layers, x))


def gradients_that_nobody_looks_after(comm):
    """Warned of once, after some steps of training, on rank 0."""
    x, options = torch.randn(4, 4), MGRIT(2, 2, 1, 1)
    for looked_after in (False, True):
        stack = made(comm, [Residual() for _ in range(6)], options)
        if looked_after:
            mlpint.ErrorControl(stack)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(14):
                stack(x).sum().backward()
        said = [str(w.message) for w in caught if "ErrorControl(stack)" in str(w.message)]
        assert len(said) == (not looked_after and comm.rank == 0), said


def slices_by_measurement(comm):
    layers, x = [Residual() for _ in range(8)], torch.randn(5, 4)
    options = converged(8)
    stack = made(comm, layers, options, chain_slices="auto")
    for batch in x, x[:1], x:
        assert_close(stack(batch), plain(layers, batch), 1e-5)
    assert stack.stats.slices in (1, 2, 4)
    chosen = {message.decode() for message in comm.gather(str(stack.stats.slices).encode())}
    assert len(chosen) == 1, chosen
    with stack.using(options=EXACT):
        assert_close(stack(x), plain(layers, x), 1e-5)
    refused(comm, '"auto"', lambda: made(comm, layers, options, chain_slices="many"))


class Normalised(Residual):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return super().forward(self.norm(x))


def buffers_that_move(comm):
    stack, x = made(comm, [Normalised() for _ in range(6)], converged(6)), torch.randn(8, 4)
    warned(comm, r"layer \d moves its buffer norm\.", lambda: stack(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack(x)  # once is enough
        made(comm, [Normalised() for _ in range(6)])(x)  # each layer is evaluated once


# --- compilers, wrappers, errors -------------------------------------------------------------------------------------


def compiled_layers_and_models(comm):
    for options in BOTH:
        reference, model = nets(comm, options)
        for layer in model.blocks.local_layers.values():
            layer.compile(backend="aot_eager")
        compiled = torch.compile(model, backend="eager")
        x = torch.randn(3, 4)
        for _ in range(2):
            a, b = reference(x), compiled(x)
            assert_close(b, a, 1e-5)
            a.sum().backward()
            b.sum().backward()
        assert_gradients_equal(model.blocks, reference.blocks, 1e-4)
        assert_close(model.embed.weight.grad, reference.embed.weight.grad, 1e-4)
    torch.compiler.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    refused(comm, "LayerParallel|disable", lambda: whole(x), Exception)


def ddp_around_the_model(comm):
    if comm.size == 1:
        return
    file = comm.gather(tempfile.mktemp().encode())[0].decode()
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=comm.rank, world_size=comm.size)
    reference, model = nets(comm, converged(6))
    wrapped, x = nn.parallel.DistributedDataParallel(model), torch.randn(3, 4)
    a, b = reference(x), wrapped(x)
    a.square().sum().backward()
    b.square().sum().backward()
    assert_close(b, a, 1e-5)
    assert_gradients_equal(model.blocks, reference.blocks, 1e-4)
    assert_close(model.embed.weight.grad, reference.embed.weight.grad, 1e-4)
    # DDP's destructor joins gloo's thread under Python's lock, which that thread needs to let go of its last message.
    time.sleep(0.2)
    torch.distributed.destroy_process_group()


class Picky(Residual):
    last = False

    def forward(self, x):
        if self.last and len(x) == 5:
            raise RuntimeError("out of memory, as it were")
        return super().forward(x)


def an_error_swallowed_on_one_rank(comm):
    if comm.size == 1:
        return
    from mpi4py import MPI

    apart = mlpint.Comm.of(MPI.COMM_WORLD.Dup())
    apart.stall_limit = 1
    stack = made(apart, [Picky() for _ in range(6)])
    if 5 in stack.local_layers:
        stack.local_layers[5].last = True
    stack(torch.randn(4, 4)).sum().backward()
    for size in (5, 4, 3):
        text = ""
        try:
            stack(torch.randn(size, 4))
        except RuntimeError as error:
            text = str(error)
        assert text, f"a batch of {size} went through"
        if size != 5:
            assert "out of step" in text, text
    comm.barrier()


if __name__ == "__main__":
    run(
        [
            layers_change_after_wrapping,
            a_whole_layer_is_replaced,
            a_shared_module_gets_an_adapter,
            layers_fill_their_arguments,
            a_loss_kept_in_an_attribute,
            dropout_is_switched_on_later,
            evaluation_leaves_the_masks_of_training_alone,
            random_numbers_of_python,
            an_output_without_gradient_says_so,
            inference_mode,
            weights_change_before_the_backward,
            a_checkpoint_around_the_stack,
            a_parameter_tied_to_the_outside,
            copies_and_pickles,
            another_default_device,
            ranks_that_differ,
            a_scaler_of_losses,
            a_mask_of_as_many_tokens_as_sequences,
            layers_that_mix_samples,
            gradients_that_nobody_looks_after,
            slices_by_measurement,
            buffers_that_move,
            ddp_around_the_model,
            an_error_swallowed_on_one_rank,
            compiled_layers_and_models,
        ]
    )
