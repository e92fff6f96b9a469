"""The C++ core's solvers for a stack's options, layout and direction. The adjoint's see the layers in reverse."""

from __future__ import annotations

from .._core import CyclicSolver, Grid, Solver
from ..comm.communicator import Comm
from .layout import partition_of
from .options import MGRIT

AnySolver = Solver | CyclicSolver


def block_solver(options: MGRIT, direction: str, owners: list[int], comm: Comm, *, norms: bool) -> Solver:
    """For consecutive layers on each rank.

    Args:
        options: of the stack.
        direction: "forward" or "backward".
        owners: rank of each layer that is solved for.
        comm: the ranks.
        norms: whether residual norms are to be computed, even if no tolerance needs them.
    """
    grid, ranks = Grid(len(owners), options.cfactor, options.levels), list(range(comm.size))
    partition = partition_of(owners, comm.size)
    if direction == "backward":
        grid, partition, ranks = grid.mirrored(), partition.mirrored(), ranks[::-1]
    return Solver(
        grid,
        partition,
        ranks,
        comm.transport,
        coarse=options.coarse,
        fcf=options.relaxation == "FCF",
        tolerance=options.tolerance,
        norms=norms,
    )


def cyclic_solver(options: MGRIT, direction: str, owners: list[int], comm: Comm, *, norms: bool) -> CyclicSolver:
    """For the layers of an interval dealt out to ranks; arguments as of :func:`block_solver`.

    Raises:
        ValueError: options that the cyclic layout is not for.
    """
    if not options.exact and (options.coarse != "sum" or options.relaxation != "F" or options.levels > 2):
        raise ValueError(
            f"layout='cyclic' is for MGRIT(levels=2, relaxation='F', coarse='sum') or exact sweeps, not {options}; "
            "use layout='block'"
        )
    grid = Grid(len(owners), options.cfactor, 2)
    if direction == "backward":
        grid, owners = grid.mirrored(), owners[::-1]
    return CyclicSolver(grid, owners, comm.transport, tolerance=options.tolerance, norms=norms)
