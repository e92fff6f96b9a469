"""What runs blocks as coarse networks, and the checks that it can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..layers.stack_store import StackStore
from ..nn import BlockStack
from ..parallel.layer_parallel import LayerParallel
from .modules import ModuleRunner
from .stacks import ParallelRunner, ParallelStackRunner, StackRunner

Runner = ModuleRunner | StackRunner | ParallelRunner


def runner_of(blocks: Sequence[nn.Module] | nn.Module) -> Runner:
    """What runs the blocks of a model as its coarse networks."""
    if isinstance(blocks, LayerParallel):
        return ParallelStackRunner(blocks) if isinstance(blocks.store, StackStore) else ParallelRunner(blocks)
    if isinstance(blocks, BlockStack):
        return StackRunner(blocks)
    return ModuleRunner(blocks)


def check_blocks(runner: Runner, optimizer: torch.optim.Optimizer) -> None:
    """Raises a ValueError for blocks that differ or share parameters, or that the optimiser does not own."""
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    stacked = runner.stack.named_parameters() if runner.parameters == {} and runner.count else ()
    for name, p in stacked:
        if p.requires_grad and p not in owned:
            raise ValueError(f"the optimiser does not own {name!r} of the stack: {_REMEDY}")
    first, shapes = -1, dict[str, tuple[int, ...]]()
    owners: dict[nn.Parameter, int] = {}
    for n, named in runner.parameters.items():
        found = {name: tuple(p.shape) for name, p in named.items()}
        if first < 0:
            first, shapes = n, found
        if found != shapes:
            name = next(k for k in {**shapes, **found} if shapes.get(k) != found.get(k))
            raise ValueError(
                f"blocks {first} and {n} differ: {name!r} is {shapes.get(name, 'missing')} in one and "
                f"{found.get(name, 'missing')} in the other; coarse networks need blocks of one shape: pass only such"
            )
        for name, p in named.items():
            if p not in owned:
                raise ValueError(f"the optimiser does not own {name!r} of block {n}: {_REMEDY}")
            if owners.setdefault(p, n) != n:
                raise ValueError(
                    f"blocks {owners[p]} and {n} share {name!r}: coarse networks train blocks apart from each other; "
                    "give each block its own parameters"
                )


_REMEDY = (
    "pass the one that trains the blocks, made after they were put in their place, or set requires_grad=False for what "
    "is not to be trained"
)
