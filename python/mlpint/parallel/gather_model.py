"""All of a layer-parallel model in one place, for what is better done there than over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .layer_parallel import LayerParallel

Model = TypeVar("Model", bound=nn.Module)


def gather_model(model: nn.Module, make: Callable[[], Model]) -> tuple[Model, list[float]]:
    """A copy of a model with all its layers on this rank, in eval mode, and the step sizes of its ``blocks``.

    Collective. It shares memory with the model where that has it here, and is out of date after the next step.

    Args:
        model: what ``make`` made, its ``blocks`` perhaps replaced by a :class:`LayerParallel` of them.
        make: builds the model anew.
    """
    state = model.state_dict()
    blocks: Any = model.blocks
    with torch.device("meta"):  # neither memory nor random numbers
        copy = make()
    copy.load_state_dict(state, assign=True)
    step_size = blocks.step_size_of if isinstance(blocks, LayerParallel) else lambda n: 1.0
    return copy.eval(), [float(step_size(n)) for n in range(len(blocks))]
