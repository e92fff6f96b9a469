"""What a run says at its end: what was trained, how fast and why, how good the gradients were, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..comm.communicator import Comm
from ..control.error_control import DEFAULT_TARGET
from ..control.ladder import short_form
from ..planning.simulation import Costs, layer_parallel
from .comparison import Comparison
from .trainer import Trainer


def closing(
    trainer: Trainer, directory: Path, comparison: Comparison | None, steps: int, exact_steps: int, seconds: float
) -> Iterator[str]:
    """The lines, on the rank that reports.

    Args:
        trainer: at its last step.
        directory: of the run.
        comparison: with the exact sweep, where there was one.
        steps, exact_steps: that this process has taken.
        seconds: that they took.
    """
    config, blocks = trainer.config, trainer.blocks
    what = f"{config.model.task}, {config.model.layers} layers, dim {config.model.dim}"
    yield f"trained    {what}: {steps} steps in {seconds / 60:.1f} min on {ranks_of(trainer.comm)}, {exact_steps} exact"
    control = trainer.control
    if control is not None and control.history:
        checks = [d for d in control.history if d.measured is not None]
        changes = sum(d.after != d.before for d in control.history)
        weights = [d.consistency[1] for d in checks if d.consistency is not None]
        mu = f", mu {weights[-1]:g} at last ({min(weights):g} to {max(weights):g})" if weights else ""
        yield (
            f"control    {len(checks)} checks in {control.share:.1%} of the time, {changes} changes, "
            f"{control.skipped} steps skipped{mu}"
        )
    if trainer.skipped:
        yield f"skipped    {trainer.skipped} steps that were not finite"
    if comparison is not None:
        yield (
            f"speed      {comparison.speedup:.2f}x the exact serial sweep on the same {ranks_of(trainer.comm)} "
            f"({comparison.seconds:.3f} s against {comparison.exact_seconds:.3f} s, one forward and backward, medians "
            f"of {config.run.compare})"
        )
        bound = _counted(trainer)
        if bound is not None:
            yield f"           of {bound:.2f}x that {short_form(blocks.options)} can reach by its layer evaluations"
        yield (
            f"gradient   cosine {comparison.gradient_cosine:.4f}, relative error {comparison.gradient_error:.3f} "
            "against the exact sweep's, on one batch"
        )
    yield f"next       {'; '.join(_next(trainer, directory, comparison))}"


def ranks_of(comm: Comm) -> str:
    replicas = f"{comm.data.size} replicas of " if comm.data.size > 1 else ""
    return f"{replicas}{comm.size} rank{'s' if comm.size > 1 else ''}"


def _counted(trainer: Trainer) -> float | None:
    """Speed-up over the serial sweep if messages and all else were free; None where it is not known."""
    solver, blocks, comm = trainer.config.solver, trainer.blocks, trainer.comm
    buffers, depth = solver.open_layers + solver.close_layers, blocks.layout.depth
    try:
        step = layer_parallel(
            depth,
            comm.size,
            blocks.options,
            Costs(),
            buffers=buffers,
            layout=solver.layout,
            chain_slices=max(solver.chain_slices, 1),
        )
    except ValueError:
        return None
    return (depth + buffers) * Costs().serial / step.time


def _next(trainer: Trainer, directory: Path, comparison: Comparison | None) -> Iterator[str]:
    config, size = trainer.config, trainer.comm.size
    if size == 1:
        yield "layers on 2 ranks: mpirun -n 2 mlpint train"
    elif comparison is not None and comparison.speedup < 1.05:
        yield f"data parallelism or an exact pipeline may serve you better: mlpint plan --ranks {size}"
    elif comparison is not None and comparison.gradient_cosine < DEFAULT_TARGET["gradient"]:
        term = "" if trainer.consistency else ", or --consistency 1"
        yield f"better gradients: more steps, --forward-iters 2{term}"
    else:
        yield f"the fastest way on more ranks: mlpint plan --layers {config.model.layers} --ranks {2 * size}"
    yield f"more steps: mlpint train --resume {directory} --steps {2 * trainer.total}"
