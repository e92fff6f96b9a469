"""The solver on real ranks: exactness, inexact iterations against the textbook, work counted, results for any ranks."""

import itertools
import sys
from pathlib import Path

import torch
from layers import Residual, assert_close, assert_gradients_equal, copies, plain
from runner import run
from torch import nn

from mlpint import MGRIT, LayerParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
import reference_mgrit  # noqa: E402


def summed(comm, stats, kind, levels=None):
    """Evaluations of a kind over all ranks."""
    counts = stats.evaluations[kind]
    total = torch.tensor([float(sum(v for k, v in counts.items() if levels is None or k in levels))])
    comm.sum_ordered([total])
    return int(total)


def shared_out(comm, settings, parts):
    """A part of the settings for each number of ranks: together they have all."""
    return [s for i, s in enumerate(settings) if (i + i // 4) % parts == comm.size % parts]


def backward(stack, x):
    leaf = x.clone().requires_grad_()
    y = stack(leaf)
    y.square().sum().backward()
    return y.detach(), leaf.grad


def exact_after_enough_iterations(comm):
    torch.set_default_dtype(torch.float64)
    for steps in (1, 5, 13, 32):
        layers = [Residual() for _ in range(steps)]
        reference, x = copies(layers), torch.randn(3, 4)
        leaf = x.clone().requires_grad_()
        expected = plain(reference, leaf)
        expected.square().sum().backward()
        settings = itertools.product((2, 3, 4, 8), (2, 3), ("F", "FCF"))
        for cfactor, levels, relaxation in shared_out(comm, settings, 3):
            k = -(-steps // cfactor) if relaxation == "F" else -(-steps // (2 * cfactor)) + 1
            options = MGRIT(levels, cfactor, k, k, relaxation)
            stack = LayerParallel(copies(layers), options, comm=comm)
            y, grad = backward(stack, x)
            assert_close(y, expected, 1e-12, f"N {steps}, {options}")
            assert_close(grad, leaf.grad, 1e-12, f"N {steps}, {options}")
            assert_gradients_equal(stack, reference, 1e-12)


def every_coarse_operator_is_exact_after_enough_iterations(comm):
    """After some passes too, when the learnt ones have parameters of their own."""
    torch.set_default_dtype(torch.float64)
    for steps, cfactor, levels in ((13, 3, 2), (12, 4, 2), (13, 2, 3)):
        layers, x = [Residual() for _ in range(steps)], torch.randn(3, 4)
        reference = copies(layers)
        leaf = x.clone().requires_grad_()
        plain(reference, leaf).square().sum().backward()
        for coarse in ("scaled", "fitted", "sum", "identity"):
            if coarse == "sum" and levels > 2 and comm.size > 1:
                continue  # intervals of coarser levels span ranks; refused, see tests/programs/drop_in.py
            k = -(-steps // cfactor)
            stack = LayerParallel(copies(layers), MGRIT(levels, cfactor, 1, 1, coarse=coarse), comm=comm)
            for _ in range(6):
                backward(stack, torch.randn(3, 4))
            stack.options = MGRIT(levels, cfactor, k, k, coarse=coarse)
            stack.zero_grad()
            _, grad = backward(stack, x)
            assert_close(grad, leaf.grad, 1e-12, f"N {steps}, {stack.options}")
            assert_gradients_equal(stack, reference, 1e-12)


def better_operators_give_better_gradients(comm):
    """On layers that differ: the error of (1,1) falls from injection over scaled to fitted, and sum is second order."""
    torch.set_default_dtype(torch.float64)
    layers, x = [Residual(scale=0.2) for _ in range(16)], torch.randn(64, 4)
    for layer in layers:
        with torch.no_grad():
            layer.inner.weight.add_(torch.eye(4))
            layer.outer.weight.add_(torch.eye(4))
    errors = {}
    for coarse in ("injection", "scaled", "fitted", "sum"):
        stack = LayerParallel(copies(layers), MGRIT(2, 4, 1, 1, coarse=coarse), comm=comm)
        for _ in range(10):
            backward(stack, torch.randn(64, 4))
        y, _ = backward(stack, x)
        errors[coarse] = float((y - plain(layers, x)).detach().norm())
    assert errors["fitted"] < 0.5 * errors["injection"] and errors["sum"] < 0.5 * errors["injection"], errors
    assert errors["fitted"] < errors["scaled"] < errors["injection"], errors


def one_iteration_fewer_is_not_exact(comm):
    """The bound is sharp with F-relaxation: what the test above finds is not there from the start."""
    torch.set_default_dtype(torch.float64)
    layers = [Residual() for _ in range(12)]
    x = torch.randn(3, 4)
    y, _ = backward(LayerParallel(copies(layers), MGRIT(2, 3, 3, 3), comm=comm), x)
    assert (y - plain(layers, x)).abs().max() > 1e-9


def inexact_iterations_are_the_textbook_s(comm):
    torch.set_default_dtype(torch.float64)
    for steps, cfactor, levels in itertools.product((1, 5, 13), (2, 3, 4), (2, 3, 4)):
        layers = [Residual(3) for _ in range(steps)]
        x = torch.randn(2, 3)
        settings = itertools.product(("F", "FCF"), ("injection", "identity"), ((1, 1), (2, 1), (3, 3)))
        for relaxation, coarse, (kf, kb) in list(settings)[(comm.size + cfactor + levels) % 4 :: 4]:
            options = MGRIT(levels, cfactor, kf, kb, relaxation, coarse)
            stack = LayerParallel(copies(layers), options, comm=comm)
            stack.watch_residuals = True
            leaf, weight = x.clone().requires_grad_(), torch.cos(x)
            y = stack(leaf)
            (y * weight).sum().backward()
            expected, x_grad, grads, norms = reference_mgrit.gradients(layers, x, weight, options)
            what = f"N {steps}, {options}"
            assert_close(y, expected, 1e-12, what)
            assert_close(leaf.grad, x_grad, 1e-12, what)
            for n, layer in stack.local_layers.items():
                for p, g in zip(layer.parameters(), grads[n], strict=True):
                    assert_close(p.grad, g, 1e-12, f"{what}, layer {n}")
            for direction, expected_norms in norms.items():
                got = stack.stats.residual_norms[direction]
                assert len(got) == len(expected_norms), f"{what}: {got} {expected_norms}"
                assert all(abs(a - b) < 1e-12 for a, b in zip(got, expected_norms, strict=True)), what
                assert stack.stats.iterations[direction] == options.iterations(direction)


def work_is_optimal(comm):
    """(1,1): every layer once forwards, one combined vjp each, and on the adjoint chain an input-only vjp for each
    interval but the last, whose coarse step nothing is computed from; the last rank of the chain takes the combined
    one there."""
    for steps, cfactor, levels in ((32, 4, 2), (32, 8, 2), (13, 4, 2), (5, 2, 2), (32, 2, 3), (13, 3, 3), (1, 4, 2)):
        layers, x = [Residual() for _ in range(steps)], torch.randn(3, 4)
        intervals = -(-steps // cfactor)
        stack = LayerParallel(layers, MGRIT(levels, cfactor, 1, 1), comm=comm)
        backward(stack, x)
        counts = [summed(comm, stack.stats, k) for k in ("forward", "combined_vjp", "input_vjp", "parameter_vjp")]
        span = cfactor ** (levels - 1)
        owners = [stack.rank_of(min(start + span, steps) - 1) for start in range(0, steps, span)]
        visits = intervals - owners.count(owners[0])
        assert counts == [steps, steps, visits, 0], f"N {steps}, cf {cfactor}, levels {levels}: {counts}"
        stack.options = MGRIT(1)
        backward(stack, x)
        counts = [summed(comm, stack.stats, k) for k in ("forward", "combined_vjp", "input_vjp", "parameter_vjp")]
        assert counts == [steps, steps, 0, 0], counts
        # Each further iteration: one F-relaxation of every interval but the last, from the C-points' new values. The
        # first C-point never gets a new one, so the cycle between the first and the last finds its step done.
        stack.options = MGRIT(2, cfactor, 3, 1)
        backward(stack, x)
        last = steps - (intervals - 1) * cfactor
        expected = steps + 2 * (steps - last) - (intervals > 1)
        assert summed(comm, stack.stats, "forward") == expected, (steps, cfactor, expected)
        with torch.no_grad():
            stack(x)
        assert summed(comm, stack.stats, "forward") == expected
        assert summed(comm, stack.stats, "combined_vjp") == 0
    recomputing = LayerParallel([Residual() for _ in range(12)], MGRIT(2, 3, 1, 1), comm=comm, recompute=True)
    backward(recomputing, torch.randn(3, 4))
    visits = sum(recomputing.rank_of(end) > 0 for end in range(2, 12, 3))
    assert summed(comm, recomputing.stats, "forward") == 12 + 12 + visits


class Split(nn.Module):
    """x + W tanh(V x) with a backward of its own in two halves."""

    def __init__(self, dim=4):
        super().__init__()
        self.inner, self.outer = (nn.Parameter(torch.randn(dim, dim) * 0.3) for _ in range(2))

    def forward(self, x):
        return x + torch.tanh(x @ self.inner.t()) @ self.outer.t()

    def split_forward(self, x):
        hidden = torch.tanh(x @ self.inner.t())
        return x + hidden @ self.outer.t(), SplitTape(self, x, hidden)


class SplitTape:
    def __init__(self, layer, x, hidden):
        self.layer, self.x, self.hidden = layer, x, hidden

    def input_vjp(self, grad):
        self.grad, self.inner_grad = grad, (grad @ self.layer.outer) * (1 - self.hidden**2)
        return grad + self.inner_grad @ self.layer.inner

    def weight_vjp(self):
        return [self.inner_grad.t() @ self.x, self.grad.t() @ self.hidden]


def split_backward_needs_no_second_visit(comm):
    torch.set_default_dtype(torch.float64)
    layers, x = [Split() for _ in range(13)], torch.randn(3, 4)
    reference = copies(layers)
    plain(reference, x).square().sum().backward()
    for options in (MGRIT(2, 4, 4, 4), MGRIT(1)):
        stack = LayerParallel(copies(layers), options, comm=comm)
        backward(stack, x)
        assert_gradients_equal(stack, reference)
    stack = LayerParallel(copies(layers), MGRIT(2, 4, 1, 1), comm=comm)
    backward(stack, x)
    counts = [summed(comm, stack.stats, k) for k in ("forward", "combined_vjp", "input_vjp", "parameter_vjp")]
    assert counts == [13, 0, 13, 13], counts


def graphs_are_freed_as_they_are_used(comm):
    """In the last adjoint sweep the tapes held fall one by one; outside a pass none are held."""
    from mlpint.layers.module_evaluator import ModuleEvaluator

    held, finish = [], ModuleEvaluator._finish

    def watched(self, *args):
        result = finish(self, *args)
        held.append(len(self.tapes))
        return result

    ModuleEvaluator._finish = watched
    try:
        stack = LayerParallel([Residual() for _ in range(12)], MGRIT(2, 3, 2, 2), comm=comm)
        backward(stack, torch.randn(3, 4))
    finally:
        ModuleEvaluator._finish = finish
    assert held == list(reversed(range(len(stack.local_layers)))), held


def tolerance_stops_early(comm):
    torch.set_default_dtype(torch.float64)
    layers, x = [Residual(scale=0.05) for _ in range(24)], torch.randn(3, 4)
    reference = copies(layers)
    plain(reference, x).square().sum().backward()
    stack = LayerParallel(copies(layers), MGRIT(2, 3, 8, 8, tolerance=1e-6), comm=comm)
    y, _ = backward(stack, x)
    for direction in ("forward", "backward"):
        iterations, norms = stack.stats.iterations[direction], stack.stats.residual_norms[direction]
        assert 1 < iterations < 8 and len(norms) == iterations, (iterations, norms)
        assert norms[-2] > norms[-1]
        assert stack.stats.convergence_factor[direction] < 0.5
    assert_close(y, plain(reference, x), 1e-5)
    assert_gradients_equal(stack, reference, 1e-4)
    stack.options = MGRIT(2, 3, 2, 2, tolerance=1e-14)  # never reached: all iterations are done
    backward(stack, x)
    assert stack.stats.iterations == {"forward": 2, "backward": 2}
    assert len(stack.stats.residual_norms["forward"]) == 2


def results_do_not_depend_on_the_ranks(comm):
    """Inexact, float32: bit for bit what one process alone computes."""
    from drop_in import one

    torch.set_default_dtype(torch.float32)
    for levels, relaxation in itertools.product((2, 3), ("F", "FCF")):
        layers, x = [Residual() for _ in range(13)], torch.randn(3, 4)
        options = MGRIT(levels, 3, 2, 2, relaxation)
        stack, alone = (LayerParallel(copies(layers), options, comm=c) for c in (comm, one()))
        for got, expected in zip(backward(stack, x), backward(alone, x), strict=True):
            assert torch.equal(got, expected)
        for n, layer in stack.local_layers.items():
            for p, q in zip(layer.parameters(), alone.local_layers[n].parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)


def cyclic_layout_is_the_block_layout(comm):
    """Wherever the layers are, `sum` gives the same; and it is exact after enough iterations."""
    from drop_in import one

    torch.set_default_dtype(torch.float64)
    for steps, cfactor, k in itertools.product((1, 5, 13, 16), (2, 3, 4, 8), (0, 1, 2, 3)):
        if comm.size % cfactor and cfactor % comm.size:
            continue
        layers, x = [Residual() for _ in range(steps)], torch.randn(3, 4)
        options = MGRIT(2, cfactor, k, k, coarse="sum")
        stack = LayerParallel(copies(layers), options, comm=comm, layout="cyclic")
        reference = LayerParallel(copies(layers), options, comm=one())
        for s in (stack, reference):
            s.watch_residuals = True
        results = [backward(s, x) for s in (stack, reference)]
        for got, expected in zip(*results, strict=True):
            assert_close(got, expected, 1e-12, f"N {steps}, {options}")
        assert_gradients_equal(stack, reference.local_layers, 1e-12)
        for direction, norms in stack.stats.residual_norms.items():
            expected = reference.stats.residual_norms.get(direction, [])
            assert len(norms) == len(expected)
            assert all(abs(a - b) < 1e-12 for a, b in zip(norms, expected, strict=True)), (norms, expected)
        k = -(-steps // cfactor)
        to_rounding = MGRIT(2, cfactor, 20, 20, coarse="sum", tolerance=1e-14)
        for options in (MGRIT(2, cfactor, k, k, coarse="sum"), to_rounding):
            plain_layers = copies(layers)
            plain(plain_layers, x).square().sum().backward()
            stack.options = options
            stack.zero_grad()
            backward(stack, x)
            assert_gradients_equal(stack, plain_layers, 1e-12)


def cyclic_layout_deals_evenly(comm):
    for cfactor in (2, 4, 8):
        if comm.size % cfactor and cfactor % comm.size:
            continue
        stack = LayerParallel([Residual() for _ in range(16)], MGRIT(2, cfactor), comm=comm, layout="cyclic")
        owned = [stack.rank_of(n) for n in range(16)]
        assert all(owned.count(r) == 16 // comm.size for r in range(comm.size)), owned
        try:
            stack(torch.randn(3, 4))
        except ValueError as error:
            assert "coarse='sum'" in str(error)
        else:
            raise AssertionError("injection in the cyclic layout")
    if comm.size == 4:
        try:
            LayerParallel([Residual()], MGRIT(2, 3), comm=comm, layout="cyclic")
        except ValueError as error:
            assert "their number, 4, must be a multiple of cfactor or divide it" in str(error)
        else:
            raise AssertionError("3 layers dealt to 4 ranks")


class Masked(Residual):
    """Takes a mask that follows the batch, and one number for all."""

    def forward(self, x, mask=1.0, scale=1.0):
        return x + scale * mask * (super().forward(x) - x)


def chains_in_slices_change_nothing(comm):
    """Any N, operator, number of levels and of slices, also those that do not divide the batch."""
    torch.set_default_dtype(torch.float64)
    settings = itertools.product(
        ((5, 3), (13, 3), (33, 8)), (2, 3), ("F", "FCF"), ("injection", "fitted", "sum", "identity")
    )
    for number, ((steps, cfactor), levels, relaxation, coarse) in shared_out(comm, enumerate(settings), 2):
        kf, kb = ((1, 1), (2, 1), (0, 1), (2, 2), (2, 0))[number % 5]
        cyclic = number % 2 and not (comm.size % cfactor and cfactor % comm.size)
        if levels > 2 and (coarse == "sum" or relaxation == "FCF"):
            continue
        layers = [Masked() for _ in range(steps)]
        x, mask = torch.randn(5, 4), torch.randn(5, 1).requires_grad_()
        layout = "cyclic" if coarse == "sum" and cyclic and relaxation == "F" else "block"
        options = MGRIT(levels, cfactor, kf, kb, relaxation, coarse)
        what = f"N {steps}, {options}, {layout}"
        stacks = [
            LayerParallel(copies(layers), options, comm=comm, layout=layout, recompute=number % 3 == 0, chain_slices=m)
            for m in (1, (2, 3, 5)[number % 3])
        ]
        for _ in range(3 if coarse == "fitted" else 1):  # it has learnt something from the second pass on
            results = []
            for stack in stacks:
                stack.watch_residuals = True
                leaf, own_mask = x.clone().requires_grad_(), mask.detach().clone().requires_grad_()
                stack.zero_grad()
                y = stack(leaf, mask=own_mask, scale=0.7)
                y.square().sum().backward()
                norms = [torch.tensor(v) for v in stack.stats.residual_norms.values()]
                results.append((y, leaf.grad, own_mask.grad, *norms))
        for expected, got in zip(*results, strict=True):
            assert_close(got, expected, 1e-11, what)
        assert_gradients_equal(stacks[1], stacks[0].local_layers, 1e-11)
        if coarse != "sum" or layout == "block":
            assert summed(comm, stacks[1].stats, "forward") == summed(comm, stacks[0].stats, "forward"), what


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x):
        return x + 0.3 * nn.functional.dropout(torch.tanh(self.body(x)), 0.5)


def slices_have_masks_of_their_own(comm):
    """The same in the chain, in relaxation and in the adjoint: converged iterations are one exact network."""
    torch.set_default_dtype(torch.float64)
    layers, x = [Dropping() for _ in range(9)], torch.randn(4, 4)
    for coarse in ("injection", "sum"):
        results = []
        for k in (3, 4):
            stack = LayerParallel(copies(layers), MGRIT(2, 3, k, k, coarse=coarse), comm=comm, chain_slices=2)
            stack.dropout_key(7)
            results.append((*backward(stack, x), *(p.grad for p in stack.parameters() if p.grad is not None)))
        for expected, got in zip(*results, strict=True):
            assert_close(got, expected, 1e-12, coarse)


def large_states(comm):
    """Messages far over any MPI's eager limit, in both directions at once."""
    layers, x = [Residual(64) for _ in range(8)], torch.randn(4096, 64)
    reference = copies(layers)
    expected = plain(reference, x)
    stack = LayerParallel(copies(layers), MGRIT(2, 2, 4, 4), comm=comm)
    assert_close(stack(x), expected, 1e-5)


if __name__ == "__main__":
    run(
        [
            exact_after_enough_iterations,
            every_coarse_operator_is_exact_after_enough_iterations,
            better_operators_give_better_gradients,
            one_iteration_fewer_is_not_exact,
            inexact_iterations_are_the_textbook_s,
            work_is_optimal,
            split_backward_needs_no_second_visit,
            graphs_are_freed_as_they_are_used,
            tolerance_stops_early,
            results_do_not_depend_on_the_ranks,
            cyclic_layout_is_the_block_layout,
            cyclic_layout_deals_evenly,
            chains_in_slices_change_nothing,
            slices_have_masks_of_their_own,
            large_states,
        ]
    )
