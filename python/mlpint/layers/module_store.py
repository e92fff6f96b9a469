"""Layers that are modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .evaluator import LayerCall
from .module_evaluator import ModuleEvaluator
from .random_keys import LayerRandom


class ModuleStore:
    """As :class:`mlpint.layers.store.LayerStore`.

    Args:
        modules: by index in the network, ascending.
    """

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        self._indices = tuple(modules)
        self._registered: dict[str, nn.Module | None] = {str(n): module for n, module in modules.items()}
        self._in_place: dict[int, bool] = {}

    @property
    def modules(self) -> Mapping[int, nn.Module]:
        layers: dict[int, nn.Module] = {}
        for n in self._indices:
            layer = self._registered.get(str(n))
            if layer is None:
                raise RuntimeError(f"layer {n} has been taken out of its layer-parallel stack")
            layers[n] = layer
        return MappingProxyType(layers)  # a layer is replaced in the stack: setattr(stack, "3", layer)

    @property
    def example(self) -> nn.Module | None:
        return next(iter(self.modules.values()), None)

    def register(self, owner: nn.Module) -> None:
        for name, module in self._registered.items():
            owner.add_module(name, module)
        self._registered = owner._modules  # so that a layer that is replaced there is replaced here

    def trainable_parameters(self) -> dict[int, tuple[nn.Parameter, ...]]:
        return {
            n: tuple(
                dict.fromkeys(
                    p for m in _submodules(layer) for p in m._parameters.values() if p is not None and p.requires_grad
                )
            )
            for n, layer in self.modules.items()
        }

    def by_layer(self, tensors: Mapping[int, tuple[torch.Tensor | None, ...]]) -> dict[int, tuple]:
        return dict(tensors)

    def gradients(self, excluded: Collection[nn.Parameter]) -> dict[int, list[torch.Tensor]]:
        counted, gradients = set(excluded), {}
        for n, module in self.modules.items():
            held = [p for p in module.parameters() if p.grad is not None and p not in counted]
            counted.update(held)
            gradients[n] = [p.grad for p in held if p.grad is not None]
        return gradients

    def evaluator(self, call: LayerCall) -> ModuleEvaluator:
        return ModuleEvaluator(self.modules, call, self._in_place)

    def run(self, call: LayerCall, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        evaluator = self.evaluator(call)
        with call.random.preserved(state[0].device):
            for n in evaluator.layers:
                state = evaluator.evaluate(n, state)
        return state

    def drawing(self, random: LayerRandom) -> str | None:
        layers = [n for n, module in self.modules.items() if random.draws(n, module.training)]
        return f"layers {layers}" if layers else None

    @contextmanager
    def watched(self, look: Callable[..., None]) -> Iterator[None]:
        def hook(n: int) -> Callable[..., None]:
            return lambda module, inputs, output: look(n, type(module).__name__, module.parameters(), inputs, output)

        handles = [module.register_forward_hook(hook(n)) for n, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def select(self, layers: Sequence[int]) -> Iterator[ModuleStore]:
        own = self.modules
        yield ModuleStore({i: own[n] for i, n in enumerate(layers) if n in own})

    def save(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The modules add all themselves."""

    def load(self, state_dict: dict[str, Any], prefix: str, missing: list[str], errors: list[str]) -> None:
        """The modules take up all themselves."""

    def may_have(self, layer: int, entry: str) -> bool:
        return True


def _submodules(module: nn.Module) -> Iterable[nn.Module]:
    """As ``module.modules()``, quicker: every pass asks, because a layer may get or lose parts at any time."""
    visited: dict[nn.Module, None] = {}
    pending = [module]
    while pending:
        current = pending.pop()
        if current not in visited:
            visited[current] = None
            pending.extend(child for child in reversed(current._modules.values()) if child is not None)
    return visited
