"""The consistency term on real ranks, against the term written out in plain PyTorch on the same modules."""

import itertools
from unittest import mock

import torch
from layers import Residual, assert_close, assert_gradients_equal, copies
from runner import raises, run

from mlpint import MGRIT, LayerParallel
from mlpint.layers.consistency import ConsistencyPart
from mlpint.layers.module_evaluator import ModuleEvaluator
from mlpint.nn import BlockStack

MU = 0.7


def intervals(depth, cfactor, origin=0):
    starts = range(0, depth, cfactor)
    return [range(origin + s, origin + min(s + cfactor, depth)) for s in starts if min(s + cfactor, depth) - s > 1]


def coarse_step(options, learnt, position, length, u, v):
    """Phi_c written out; ``learnt``: tensors by name, as for checkpoints."""
    if options.coarse == "identity":
        return u
    solution = learnt.get(f"forward.{options.coarse}.{position}.{length}.0.solution")
    f = v - u
    if options.coarse == "injection" or solution is None:
        return u + length * f
    if options.coarse == "scaled":
        return u + solution * f
    return u + f @ solution[:-1] + solution[-1]


def term(layers, states, own, count, origin, step):
    """mu R over some intervals, at given states u_K."""
    total = 0.0
    for interval in own:
        u = states[interval[0]] if interval[0] == origin else states[interval[0]].detach()
        end = v = layers[interval[0]](u)
        for n in interval[1:]:
            end = layers[n](end)
        e = end - step(interval[0] - origin, len(interval), u, v)
        total = total + MU / count * e.square().sum() / (end - u).square().sum().detach()
    return total


def loss_of(y):
    return (y * torch.cos(torch.arange(y.numel())).view_as(y)).sum() + y.square().sum()


def exact_gradients(comm):
    """Converged MGRIT, exact sweeps and both with slices; ragged intervals, buffers, every operator."""
    torch.set_default_dtype(torch.float64)
    settings = itertools.product(
        ("injection", "identity", "scaled", "fitted"), ((7, 3, 0), (9, 4, 1), (8, 2, 0)), ("MGRIT", "exact")
    )
    for number, (coarse, (depth, cfactor, origin), how) in enumerate(settings):
        k = -(-depth // cfactor)
        layers = [Residual() for _ in range(depth + 2 * origin)]
        reference, x = copies(layers), torch.randn(6, 4)
        more = {"open_layers": origin, "close_layers": origin, "recompute": number % 5 == 4}
        if number % 3 == 1:
            more["chain_slices" if how == "MGRIT" else "serial_microbatches"] = 2
        learning = MGRIT(2, cfactor, 1, 1, coarse=coarse)
        stack = LayerParallel(copies(layers), learning, comm=comm, consistency=MU, **more)
        for _ in range(3 if coarse in ("scaled", "fitted") else 0):
            loss_of(stack(torch.randn(6, 4))).backward()
        stack.options = MGRIT(3 if depth == 8 else 2, cfactor, k, k, coarse=coarse)
        if how == "exact":
            stack.options = MGRIT(cfactor=cfactor, forward_iters=0, backward_iters=0, coarse=coarse)
        learnt = {n: t.clone() for n, t in stack.learnt_tensors().items()}
        stack.zero_grad()
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss_of(stack(leaf)).backward()

        states = [other]
        for layer in reference:
            states.append(layer(states[-1]))
        everywhere = intervals(depth, cfactor, origin)
        own = [i for i in everywhere if i[0] in stack.local_layers]
        step = lambda *args, options=stack.options, learnt=learnt: coarse_step(options, learnt, *args)  # noqa: E731
        (loss_of(states[-1]) + term(reference, states, own, len(everywhere), origin, step)).backward()
        what = f"{coarse}, N {depth}, cf {cfactor}, {how}, {more}"
        assert_gradients_equal(stack, reference, 1e-10)
        if 0 in stack.local_layers:
            assert_close(leaf.grad, other.grad, 1e-10, what)
        ratios = stack.stats.relative_errors
        assert sorted(ratios) == [i[0] for i in own] and all(r > 0 for r in ratios.values()), (what, ratios)


def at_the_solvers_own_states(comm):
    """(1,1) and (2,1), not converged: what the term adds is its gradient at the states of the last sweep."""
    torch.set_default_dtype(torch.float64)
    seen = {}
    see = ConsistencyPart.see

    def watched(part, layer, before, after):
        seen[layer] = before.tensors[0].clone()
        see(part, layer, before, after)

    iterations = (1, 1), (2, 1), (0, 1), (1, 0)
    for coarse, (kf, kb), levels in itertools.product(("injection", "identity"), iterations, (2, 3)):
        layers, x = [Residual() for _ in range(11)], torch.randn(6, 4)
        options, grads = MGRIT(levels, 3, kf, kb, coarse=coarse), []
        for mu in (0.0, MU):
            stack = LayerParallel(copies(layers), options, comm=comm, consistency=mu, chain_slices=2)
            leaf = x.clone().requires_grad_()
            with mock.patch.object(ConsistencyPart, "see", watched):
                loss_of(stack(leaf)).backward()
            grads.append([leaf.grad, *(p.grad for p in stack.parameters())])
        reference, everywhere = copies(layers), intervals(11, 3)
        states = {0: x.clone().requires_grad_()} | {n: s for n, s in seen.items() if n > 0}
        own = [i for i in everywhere if i[0] in stack.local_layers]
        step = lambda *args, options=options: coarse_step(options, {}, *args)  # noqa: E731
        added = term(reference, states, own, len(everywhere), 0, step)
        wanted = [p for n in stack.local_layers for p in reference[n].parameters()]
        expected = [None] * len(wanted)
        if own:
            expected = torch.autograd.grad(added, wanted, retain_graph=True, allow_unused=True)
        for before, after, plain in zip(grads[0][1:], grads[1][1:], expected, strict=True):
            assert_close(after - before, torch.zeros_like(before) if plain is None else plain, 1e-10, f"{options}")
        if 0 in stack.local_layers:
            assert_close(grads[1][0] - grads[0][0], torch.autograd.grad(added, states[0])[0], 1e-10, f"{options}")


def stacks_are_as_their_layers(comm):
    """Stacked blocks, whose backward comes in two halves."""
    torch.manual_seed(5)
    blocks = BlockStack(9, 8, 2).double()
    layers = blocks.to_blocks()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for kf, kb in ((1, 1), (0, 0)):
        options = MGRIT(2, 3, kf, kb)
        pair = [LayerParallel(kind, options, comm=comm, consistency=MU) for kind in (blocks, layers)]
        results = []
        for stack in pair:
            stack.zero_grad()
            leaf = x.clone().requires_grad_()
            loss_of(stack(leaf)).backward()
            gradients = stack.store.gradients(())
            results.append([leaf.grad, *(g.norm() for n in sorted(gradients) for g in gradients[n])])
        for a, b in zip(*results, strict=True):
            assert_close(a, b, 1e-9, f"{options}")


def nothing_more_is_evaluated(comm):
    """But for what the chain finished without the term; and no message more."""
    layers, x = [Residual() for _ in range(12)], torch.randn(4, 4)
    counts = []
    for mu in (0.0, 1.0):
        stack = LayerParallel(copies(layers), MGRIT(2, 3, 2, 2), comm=comm, consistency=mu)
        with mock.patch.object(ModuleEvaluator, "finishes_on_chain", property(lambda _: False)):
            loss_of(stack(x)).backward()
        counts.append({kind: dict(c) for kind, c in stack.stats.evaluations.items()})
    assert counts[0] == counts[1], counts


def what_is_refused(comm):
    layers = [Residual() for _ in range(8)]
    for mu in (-1, float("nan"), float("inf"), "much"):
        raises(ValueError, "consistency =", lambda mu=mu: LayerParallel(layers, MGRIT(), comm=comm, consistency=mu))
    for options, word in ((MGRIT(coarse="sum"), "not 'sum'"), (MGRIT(cfactor=8), None)):
        make = lambda options=options: LayerParallel(layers, options, comm=comm, consistency=0.1)  # noqa: E731
        raises(ValueError, word, make) if word else make()
    raises(ValueError, "several layers", lambda: LayerParallel(layers[:1], MGRIT(), comm=comm, consistency=0.1))
    stack = LayerParallel(layers, MGRIT(cfactor=2), comm=comm)
    raises(ValueError, "at least 0", lambda: setattr(stack, "consistency", -0.1))
    if comm.size == 4:
        stack.consistency = 0.1
        stack.options = MGRIT(cfactor=4)
        raises(ValueError, "on one rank", lambda: stack(torch.randn(2, 4)))


if __name__ == "__main__":
    run(
        [
            exact_gradients,
            at_the_solvers_own_states,
            stacks_are_as_their_layers,
            nothing_more_is_evaluated,
            what_is_refused,
        ]
    )
