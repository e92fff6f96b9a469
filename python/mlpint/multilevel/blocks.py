"""The blocks of a user's model: what runs them as coarse networks, and the checks that it can."""

from __future__ import annotations

import torch
from torch import nn

from ..flops import Blocks
from ..layers.encoder_decoder_store import TWO_KINDS, EncoderDecoderStore
from ..layers.stack_store import StackStore
from ..nn import BlockStack, EncoderDecoder
from ..parallel.layer_parallel import LayerParallel
from .module_runner import ModuleRunner
from .runner import Runner
from .stack_runner import StackRunner
from .stacks import ParallelRunner, ParallelStackRunner

_REMEDY = (
    "pass the one that trains the blocks, made after they were put in their place, or set requires_grad=False for what "
    "is not to be trained"
)


def runner_of(blocks: Blocks) -> Runner:
    """What runs the blocks of a model as its coarse networks."""
    store = blocks.store if isinstance(blocks, LayerParallel) else None
    if isinstance(blocks, EncoderDecoder) or isinstance(store, EncoderDecoderStore):
        raise ValueError(TWO_KINDS)
    if isinstance(blocks, LayerParallel):
        return ParallelStackRunner(blocks, store.stack) if isinstance(store, StackStore) else ParallelRunner(blocks)
    if isinstance(blocks, BlockStack):
        return StackRunner(blocks)
    return ModuleRunner(blocks)


def check_blocks(blocks: Blocks, runner: Runner, optimizer: torch.optim.Optimizer) -> None:
    """Raises a ValueError for blocks that differ or share parameters, or that the optimiser does not own."""
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    if not runner.parameters and isinstance(blocks, nn.Module):
        for name, p in blocks.named_parameters():
            if p.requires_grad and p not in owned:
                raise ValueError(f"the optimiser does not own {name!r} of the stack: {_REMEDY}")
    owners: dict[nn.Parameter, int] = {}
    first, first_shapes = -1, dict[str, tuple[int, ...]]()
    for n, named in runner.parameters.items():
        shapes = {name: tuple(p.shape) for name, p in named.items()}
        if first < 0:
            first, first_shapes = n, shapes
        if shapes != first_shapes:
            name = next(k for k in {**first_shapes, **shapes} if first_shapes.get(k) != shapes.get(k))
            raise ValueError(
                f"blocks {first} and {n} differ: {name!r} is {first_shapes.get(name, 'missing')} in one and "
                f"{shapes.get(name, 'missing')} in the other; coarse networks need blocks of one shape: pass only such"
            )
        for name, p in named.items():
            if p not in owned:
                raise ValueError(f"the optimiser does not own {name!r} of block {n}: {_REMEDY}")
            if owners.setdefault(p, n) != n:
                raise ValueError(
                    f"blocks {owners[p]} and {n} share {name!r}: coarse networks train blocks apart from each other; "
                    "give each block its own parameters"
                )
