"""Options in order of what they cost: more iterations, fewer, none (the exact sweep)."""

from __future__ import annotations

import dataclasses

from ..mgrit.options import MGRIT


def exact_options(options: MGRIT) -> MGRIT:
    """The exact serial sweep."""
    return dataclasses.replace(options, forward_iters=0, backward_iters=0)


def enough(options: MGRIT, depth: int) -> int:
    """Iterations after which MGRIT is exact for so many layers."""
    if options.relaxation == "F":
        return -(-depth // options.cfactor)
    return -(-depth // (2 * options.cfactor)) + 1


def finer(options: MGRIT) -> MGRIT:
    """One more iteration in each direction that iterates."""
    more = {n: k + 1 for n in ("forward_iters", "backward_iters") if (k := getattr(options, n))}
    return dataclasses.replace(options, tolerance=0.0, **more)


def doubled(options: MGRIT, depth: int) -> MGRIT:
    """Twice the iterations, but not more than make it exact: beyond, residuals are rounding errors."""
    most = max(enough(options, depth), 2)
    more = {n: min(2 * k, most) for n in ("forward_iters", "backward_iters") if (k := getattr(options, n))}
    return dataclasses.replace(options, tolerance=0.0, **more)


def describe(options: MGRIT) -> str:
    """Short form for logs: ``exact`` or ``(2,1) cf 4 sum``; iterations forwards and backwards."""
    if options.exact:
        return "exact"
    more = [options.coarse] if options.coarse != "injection" else []
    more += [f"{options.levels} levels"] if options.levels > 2 else []
    more += [options.relaxation] if options.relaxation != "F" else []
    return " ".join([f"({options.forward_iters},{options.backward_iters}) cf {options.cfactor}", *more])


def default_ladder(options: MGRIT, depth: int) -> list[MGRIT]:
    """Rungs from the given options up: iterations raised in turn, then exact forwards, then exact.

    (1,1), (2,1), (2,2), (3,2), (3,3), (0,3), (0,0); what would be exact anyway is left out. A direction that is exact
    stays so.

    Args:
        options: the cheapest rung.
        depth: layers that the solver has, without open and close layers.
    """
    rungs, most = [options], enough(options, depth)
    for _ in range(4):
        last = rungs[-1]
        names = [n for n in ("forward_iters", "backward_iters") if 0 < getattr(last, n) < most - 1]
        if names:
            name = min(names, key=lambda n: getattr(last, n))  # forwards first
            rungs.append(dataclasses.replace(last, **{name: getattr(last, name) + 1}))
    if options.forward_iters and options.backward_iters:
        rungs.append(dataclasses.replace(rungs[-1], forward_iters=0))
    return [*rungs, exact_options(options)]
