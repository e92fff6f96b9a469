"""The tensors that a training needs to go on from the middle of a cycle, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .copies import Copies, Key
from .optimizer_state import ParameterState
from .options import MultilevelOptions

SavedCopies = tuple[dict[Key, torch.Tensor], dict[Key, ParameterState]]  # weights, and the optimiser's state


def copies_tensors(network: str, copies: Copies) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a network's copies: ``weights/A/LAYER/NAME`` and ``state/A/LAYER/NAME/KEY``."""
    for (n, name), value in copies.weights():
        yield f"weights/{network}/{n}/{name}", value
    for (n, name), state in copies.states().items():
        for key, value in state.items():
            if value is not None:
                yield f"state/{network}/{n}/{name}/{key}", torch.as_tensor(value, device="cpu")


def saved_copies(tensors: Mapping[str, torch.Tensor], networks: Sequence[str]) -> dict[str, SavedCopies]:
    """The networks' copies, in the order of their names, from all tensors of a state dict but what was learnt.

    Raises:
        ValueError: a tensor of another kind, or of another network.
    """
    by_network: dict[str, SavedCopies] = {network: ({}, {}) for network in networks}
    for path, value in tensors.items():
        kind, network, *rest = path.split("/")
        if kind not in ("weights", "state") or network not in by_network:
            raise ValueError(f"tensor {path!r}: this training has no place for it; was it saved by another version?")
        weights, states = by_network[network]
        n, name, *key = rest
        if kind == "weights":
            weights[int(n), name] = value
        else:
            states.setdefault((int(n), name), {})[key[0]] = value
    return by_network


def check_options(options: MultilevelOptions, saved: Mapping[str, Any]) -> None:
    """Raises a ValueError where the options are not those that were saved, be it as JSON."""
    for name, now in dataclasses.asdict(options).items():
        then = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
        if now != then:
            raise ValueError(f"{name} = {now!r}: must be {then!r}, as it was when the state was saved")
