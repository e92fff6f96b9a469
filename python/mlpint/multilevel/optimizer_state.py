"""The optimiser's state on the levels: what a coarse network starts from, and what is left of it for its parent.

The gradient of a block whose step is s times as long is s times as large. So what averages gradients (SGD's momentum,
Adam's m) is multiplied by s on its way down and divided by s on its way up, what averages their squares (Adam's v) by
s^2. On the way up the averages of the parent and of the coarse network are added with the weights that the parameters
are, 1 - delta and delta, and the averages of squares with their squares, as the variance of such a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

ParameterState = dict[str, Any]

_FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg"})
_SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
_MOMENTS = _FIRST_MOMENTS | _SECOND_MOMENTS


def placed(state: Mapping[str, Any], p: torch.Tensor) -> ParameterState:
    """A copy on the parameter's device; counts stay in host memory, where optimisers have them."""
    return {
        key: value.to(p.device if value.dim() else value.device, copy=True)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in state.items()
    }


@torch.no_grad()
def restricted(state: Mapping[str, Any], ratio: float) -> ParameterState:
    """What a coarse network starts from, a copy."""
    own: ParameterState = {}
    for key, value in state.items():
        if key in _MOMENTS and value is not None:
            own[key] = value * _power(key, ratio)
        else:
            own[key] = value.clone() if isinstance(value, torch.Tensor) else value
    return own


@torch.no_grad()
def prolonged(parent: Mapping[str, Any], coarse: Mapping[str, Any], ratio: float, delta: float) -> ParameterState:
    """What the parent goes on with; the count of steps is the coarse network's, which includes the parent's."""
    averages: ParameterState = {}
    for key, value in coarse.items():
        if not isinstance(value, torch.Tensor) or key not in _MOMENTS:
            averages[key] = value
            continue
        power = 1 if key in _FIRST_MOMENTS else 2
        averages[key] = value * (delta**power / _power(key, ratio))
        if parent.get(key) is not None:
            averages[key].add_(parent[key], alpha=(1 - delta) ** power)
    return averages


def check_averaged(name: str, state: Mapping[str, Any], shape: torch.Size) -> None:
    """Raises a ValueError for a state whose average over levels would make no sense."""
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0 and key not in _MOMENTS:
            continue
        if value.shape != shape:
            raise ValueError(
                f"the optimiser's {key!r} of {name} is {tuple(value.shape)}, the parameter {tuple(shape)}: such a "
                "state cannot be averaged over levels; pass state='carry'"
            )
        if key not in _MOMENTS:
            raise ValueError(
                f"the optimiser keeps {key!r} of {name}, and how to average it over levels is not known (known are "
                f"{', '.join(sorted(_MOMENTS))}); pass state='carry'"
            )


def _power(key: str, ratio: float) -> float:
    return ratio if key in _FIRST_MOMENTS else ratio**2
