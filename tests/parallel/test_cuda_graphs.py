"""Captured stacks: what is refused, and that replays give what the stack gives.

Without a GPU the graphs are stood in for by ``Rerun``, which does the recorded work again on the same tensors: all but
the capture itself is tested. Tests marked ``gpu`` capture real graphs.
"""

import copy

import pytest
import torch
from torch import nn

import mlpint
from mlpint import MGRIT, LayerParallel
from mlpint.nn import Block, BlockStack
from mlpint.parallel.cuda_graphs import capture

DIM, DEPTH = 8, 8


class Rerun:
    """A recorder whose graphs do the work again and put its results where the first ones were.

    CUDA graphs share a memory pool: what a later graph writes its results to is memory that an earlier one may use on
    the way. So a replay spoils the results of all graphs recorded after it.
    """

    def __init__(self):
        self.replays = 0
        self.graphs = []

    def warm_up(self, work):
        work()

    def record(self, work):
        return RerunGraph(work, self)


class RerunGraph:
    def __init__(self, work, recorder):
        self.work, self.recorder = work, recorder
        self.outputs = work()
        recorder.graphs.append(self)

    def replay(self):
        self.recorder.replays += 1
        graphs = self.recorder.graphs
        with torch.no_grad():
            for later in graphs[graphs.index(self) + 1 :]:
                for output in later.outputs:
                    if output is not None:
                        output.fill_(torch.nan)
            for kept, new in zip(self.outputs, self.work(), strict=True):
                if kept is not None:
                    kept.copy_(new)


def step(stack, x, *args, **kwargs):
    """Result, gradient of x and of the parameters."""
    stack.zero_grad()
    x = x.clone().requires_grad_()
    y = stack(x, *args, **kwargs)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in stack.parameters())]


def stack_of(kind, options, **keywords):
    blocks = [Block(DIM, 2, depth=DEPTH) for _ in range(DEPTH)]
    layers = BlockStack.from_blocks(blocks) if kind == "stacked" else blocks
    return LayerParallel(layers, options, **keywords)


OPTIONS = {
    "exact": MGRIT(levels=1),
    "(1,1)": MGRIT(cfactor=2, forward_iters=1, backward_iters=1),
    "sum (2,1)": MGRIT(cfactor=4, forward_iters=2, backward_iters=1, coarse="sum"),
    "FCF": MGRIT(cfactor=2, forward_iters=2, backward_iters=2, relaxation="FCF"),
}


@pytest.mark.parametrize("kind", ["modules", "stacked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_replays_give_what_the_stack_gives(kind, options):
    stack = stack_of(kind, options)
    recorder = Rerun()
    captured = capture(stack, torch.randn(2, 4, DIM, requires_grad=True), recorder=recorder)
    batches = [torch.randn(2, 4, DIM) for _ in range(3)]
    expected = [step(stack, x) for x in batches]
    captured.install()
    for x, wanted in zip(batches, expected, strict=True):
        for result, right in zip(step(stack, x), wanted, strict=True):
            torch.testing.assert_close(result, right, rtol=0, atol=0)
    assert recorder.replays == 6
    captured.remove()
    step(stack, batches[0])
    assert recorder.replays == 6


def test_recompute_and_keyword_arguments():
    stack = stack_of("modules", OPTIONS["(1,1)"], recompute=True)
    lengths = torch.tensor([2, 4])
    captured = capture(
        stack, torch.randn(2, 4, DIM, requires_grad=True), lengths=torch.tensor([4, 4]), recorder=Rerun()
    )
    x = torch.randn(2, 4, DIM)
    expected = step(stack, x, lengths=lengths)
    captured.install()
    for result, right in zip(step(stack, x, lengths=lengths), expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0, atol=0)


def test_any_module_can_be_captured():
    stack = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
    captured = capture(stack, torch.randn(3, DIM, requires_grad=True), recorder=Rerun())
    x = torch.randn(3, DIM)
    expected = step(stack, x)
    captured.install()
    for result, right in zip(step(stack, x), expected, strict=True):
        torch.testing.assert_close(result, right)


def test_gradients_accumulate():
    stack = stack_of("stacked", OPTIONS["(1,1)"])
    captured = capture(stack, torch.randn(2, 4, DIM, requires_grad=True), recorder=Rerun())
    batches = [torch.randn(2, 4, DIM) for _ in range(3)]
    expected = [sum(grads) for grads in zip(*(step(stack, x)[2:] for x in batches), strict=True)]
    stack.zero_grad()
    for x in batches:
        captured(x).square().sum().backward()
    for p, right in zip(stack.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, right)


def test_results_are_not_overwritten_by_the_next_pass():
    stack = stack_of("stacked", OPTIONS["exact"])
    captured = capture(stack, torch.randn(2, 4, DIM), recorder=Rerun())
    x, other = torch.randn(2, 2, 4, DIM).unbind()
    with torch.no_grad():
        first = captured(x)
        captured(other)
        assert torch.equal(first, captured(x)) and not first.requires_grad


def test_parameters_may_change_in_place():
    stack = stack_of("stacked", OPTIONS["(1,1)"])
    captured = capture(stack, torch.randn(2, 4, DIM, requires_grad=True), recorder=Rerun())
    optimizer = torch.optim.SGD(stack.parameters(), 0.1)
    x = torch.randn(2, 4, DIM)
    before = captured(x)
    before.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(captured(x), before)
        torch.testing.assert_close(captured(x), stack(x), rtol=0, atol=0)


def test_overwritten_states_are_not_used():
    captured = capture(stack_of("stacked", OPTIONS["exact"]), torch.randn(2, 4, DIM), recorder=Rerun())
    first, second = captured(torch.randn(2, 4, DIM)), captured(torch.randn(2, 4, DIM))
    with pytest.raises(RuntimeError, match="before the next forward"):
        first.sum().backward()
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="before the next forward"):
        second.sum().backward()


def refused(match, stack, *args, x=None, **kwargs):
    x = torch.randn(2, 4, DIM) if x is None else x
    with pytest.raises(ValueError, match=match):
        capture(stack, x, *args, recorder=Rerun(), **kwargs)


def test_refusals():
    stack = stack_of("modules", OPTIONS["exact"])
    with pytest.raises(ValueError, match="CUDA graphs need a GPU; call the stack itself"):
        mlpint.capture(stack, torch.randn(2, 4, DIM))
    refused("one tensor", stack, x=(torch.randn(2, 4, DIM),))
    refused("argument requires a gradient", stack, torch.randn(2, requires_grad=True))
    refused("tolerance = 0.1", stack_of("modules", MGRIT(tolerance=0.1)))
    refused("coarse = 'fitted'", stack_of("modules", MGRIT(coarse="fitted")))
    watched = stack_of("modules", OPTIONS["(1,1)"])
    watched.watch_residuals = True
    refused("watch_residuals", watched)
    several = stack_of("modules", OPTIONS["(1,1)"])
    several.comm = copy.copy(several.comm)
    several.comm.size = 2
    refused("2 ranks", several)


@pytest.mark.parametrize("options", ["exact", "(1,1)"])
@pytest.mark.parametrize("kind", ["modules", "stacked"])
def test_dropout_is_refused(kind, options):
    blocks = [Block(DIM, 2, dropout=0.5) for _ in range(4)]
    stack = LayerParallel(BlockStack.from_blocks(blocks) if kind == "stacked" else blocks, OPTIONS[options])
    refused("draw random numbers", stack)
    capture(stack.eval(), torch.randn(2, 4, DIM), recorder=Rerun())


def test_dropout_of_any_module_is_refused():
    refused("the stack draw random", nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.5)))
    refused("the blocks draw random", BlockStack(2, DIM, 2, dropout=0.5))


def test_what_is_not_as_captured_is_refused():
    stack = stack_of("stacked", OPTIONS["(1,1)"])
    captured = capture(stack, torch.randn(2, 4, DIM), recorder=Rerun())

    def fails(match, x=None, *args):
        with pytest.raises(ValueError, match=match):
            captured(torch.randn(2, 4, DIM) if x is None else x, *args)

    fails(r"\(2, 5, 8\) float32 on cpu, captured with \(2, 4, 8\)", torch.randn(2, 5, DIM))
    fails("float64", torch.randn(2, 4, DIM, dtype=torch.float64))
    fails("arguments", None, torch.tensor([2, 2]))
    stack.options = OPTIONS["FCF"]
    fails("options of a captured stack changed")
    stack.options = OPTIONS["(1,1)"]
    stack.eval()
    fails("training")
    stack.train()
    captured(torch.randn(2, 4, DIM))
    p = next(stack.parameters())
    p.data = p.data.clone()
    fails("places of the parameters")
    with pytest.raises(TypeError, match="remove"):
        copy.deepcopy(captured.install()._stack)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["modules", "stacked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_graphs_on_a_gpu(kind, options):
    stack = stack_of(kind, options).to("cuda")
    captured = mlpint.capture(stack, torch.randn(2, 4, DIM, device="cuda", requires_grad=True))
    batches = [torch.randn(2, 4, DIM, device="cuda") for _ in range(3)]
    expected = [step(stack, x) for x in batches]
    total = [sum(grads) for grads in zip(*(e[2:] for e in expected), strict=True)]
    captured.install()
    for x, wanted in zip(batches, expected, strict=True):
        for result, right in zip(step(stack, x), wanted, strict=True):
            torch.testing.assert_close(result, right)
    stack.zero_grad()
    for x in batches:
        stack(x).square().sum().backward()
    for p, right in zip(stack.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, right)
