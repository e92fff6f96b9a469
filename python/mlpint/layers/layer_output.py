"""The state in what a layer returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..state import describe


def output_tensors(layer: int, output: Any, inputs: Sequence[torch.Tensor], single: bool) -> tuple[torch.Tensor, ...]:
    """The new state in what a layer returned, checked against the old one.

    A layer whose state is one tensor may return a tuple that starts with it, as Hugging Face's do.

    Raises:
        ValueError: naming the layer, if shapes or dtypes changed.
    """
    if single and isinstance(output, torch.Tensor):
        tensors: tuple[torch.Tensor, ...] = (output,)
    elif isinstance(output, tuple | list) and output:
        tensors = tuple(output[:1]) if single else tuple(output)
    else:
        tensors = ()
    if len(tensors) != len(inputs) or not all(isinstance(t, torch.Tensor) for t in tensors):
        raise ValueError(
            f"layer {layer} returned {type(output).__name__}, but its state is "
            f"{'one tensor' if single else f'a tuple of {len(inputs)} tensors'}"
        )
    for new, old in zip(tensors, inputs, strict=True):
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(
                f"layer {layer} turned {describe([old])} into {describe([new])}; "
                "the layers of a LayerParallel stack must keep shape and dtype"
            )
    return tensors
