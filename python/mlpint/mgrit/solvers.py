"""The C++ core's solvers for a stack's options, layout and direction. The adjoint's see the layers in reverse."""

from __future__ import annotations

from typing import Any

from .._core import CyclicSolver, Grid, Solver
from ..comm.communicator import Comm
from .layout import Layout
from .options import MGRIT

AnySolver = Solver | CyclicSolver


class Solvers:
    """The solvers of a stack, made as they are needed and kept by what they depend on. A copy makes its own."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._made: dict[tuple, AnySolver] = {}

    def solver(self, layout: Layout, options: MGRIT, direction: str, *, norms: bool) -> AnySolver:
        """The solver of a direction.

        Args:
            layout: who owns which layer.
            options: how the depth is solved.
            direction: "forward" or "backward".
            norms: whether residual norms are to be computed, even if no tolerance needs them.

        Raises:
            ValueError: options that the cyclic layout is not for.
        """
        if layout.kind == "cyclic":
            _check_cyclic(options)
        o = options
        key = (layout, direction, o.cfactor, o.levels, o.relaxation, o.coarse, o.tolerance, norms)
        if key not in self._made:
            make = _block_solver if layout.kind == "block" else _cyclic_solver
            self._made[key] = make(layout, options, direction, self._comm, norms)
        return self._made[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Solvers:
        return Solvers(self._comm)


def _block_solver(layout: Layout, options: MGRIT, direction: str, comm: Comm, norms: bool) -> Solver:
    grid, ranks = Grid(layout.depth, options.cfactor, options.levels), list(range(comm.size))
    partition = layout.partition()
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


def _cyclic_solver(layout: Layout, options: MGRIT, direction: str, comm: Comm, norms: bool) -> CyclicSolver:
    grid, owners = Grid(layout.depth, options.cfactor, 2), list(layout.owners)
    if direction == "backward":
        grid, owners = grid.mirrored(), owners[::-1]
    return CyclicSolver(grid, owners, comm.transport, tolerance=options.tolerance, norms=norms)


def _check_cyclic(options: MGRIT) -> None:
    if not options.exact and (options.coarse != "sum" or options.relaxation != "F" or options.levels > 2):
        raise ValueError(
            f"layout='cyclic' is for MGRIT(levels=2, relaxation='F', coarse='sum') or exact sweeps, not {options}; "
            "use layout='block'"
        )
