"""A list of modules run as one of its coarse networks, whoever calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..mgrit.vectors import extrapolate
from ..state import State, describe
from .copies import trainable
from .hierarchy import Network
from .module_copies import ModuleCopies
from .options import MultilevelOptions
from .runner import Runner


class ModuleRunner(Runner):
    """Layers that are called one by one: by ``nn.Sequential``, or by the model's own loop over an ``nn.ModuleList``.

    While a coarse network runs, a layer that is not in it hands its state on, and one that is takes a longer step.

    Args:
        layers: every layer of the fine network.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = list(layers)
        self.count = len(self.layers)
        self.local_indices = range(self.count)
        self.parameters = {n: trainable(layer) for n, layer in enumerate(self.layers)}
        self.ahead = {}
        self._replaced: list[nn.Module] = []  # layers whose forward is a coarse network's
        self._returned: int | None = (
            None  # entries of the tuple that layers return, 0 for a tensor; None: not yet known
        )

    def copies(
        self, network: Network, parent: Network, optimizer: torch.optim.Optimizer, options: MultilevelOptions
    ) -> ModuleCopies:
        return ModuleCopies(network, self.parameters, optimizer, options)

    def enter(self, network: Network) -> None:
        active = set(network.layers)
        try:
            for n, layer in enumerate(self.layers):
                if "forward" in layer.__dict__:
                    raise RuntimeError(
                        f"layer {n} has a forward of its own in place of its class's: take that back before coarse "
                        "phases"
                    )
                if n in active and network.stretch == 1:
                    continue
                forward = layer.forward
                layer.__dict__["forward"] = (
                    self._stretched(n, forward, network.stretch) if n in active else self._passing(forward)
                )
                self._replaced.append(layer)
        except BaseException:
            self.exit()
            raise

    def exit(self) -> None:
        for layer in self._replaced:
            layer.__dict__.pop("forward", None)
        self._replaced = []

    def _passing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def passing(*args: Any, **kwargs: Any) -> Any:
            state = _state(forward, args, kwargs)
            if not isinstance(state, torch.Tensor):
                return state
            if self._returned is None:
                self._returned = _entries_returned(forward, args, kwargs)
            return (state, *[None] * (self._returned - 1)) if self._returned else state

        return passing

    def _stretched(self, n: int, forward: Callable[..., Any], stretch: float) -> Callable[..., Any]:
        def stretched(*args: Any, **kwargs: Any) -> Any:
            state = _state(forward, args, kwargs)
            output = forward(*args, **kwargs)
            old = (state,) if isinstance(state, torch.Tensor) else tuple(state)
            new = (output,) if isinstance(output, torch.Tensor) else tuple(output)
            if [t.shape for t in old] != [t.shape for t in new[: len(old)]]:
                raise ValueError(
                    f"layer {n} turned {describe(old)} into {describe(new[: len(old)])}: a coarse "
                    "network needs layers that keep the shape of their state"
                )
            moved = extrapolate(State(old), State(new[: len(old)]), stretch).tensors
            return moved[0] if isinstance(output, torch.Tensor) else (*moved, *new[len(old) :])

        return stretched


def _state(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    if args:
        return args[0]
    return kwargs[next(iter(inspect.signature(forward).parameters))]


@torch.no_grad()
def _entries_returned(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> int:
    """Entries of the tuple that a layer returns for a tensor, 0 for a tensor.

    It is called once to find out, without a trace in the random numbers.
    """
    device = args[0].device if args else next(iter(kwargs.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        output = forward(*args, **kwargs)
    if not isinstance(output, tuple | list):
        return 0
    if any(o is not None for o in output[1:]):
        raise ValueError(
            f"a layer returned {len(output)} values, but a coarse network's passes on the first alone, the state; turn "
            "off caching and the output of attentions, or let the layers take and return a tuple of all they pass on"
        )
    return len(output)
