"""Layers that are modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
        self.modules = dict(modules)
        self._in_place: dict[int, bool] = {}
        self._submodules = {n: list(module.modules()) for n, module in modules.items()}  # to be quick in every pass

    @property
    def example(self) -> nn.Module | None:
        return next(iter(self.modules.values()), None)

    def children(self) -> dict[str, nn.Module]:
        return {str(n): module for n, module in self.modules.items()}

    def trainable_parameters(self) -> dict[int, tuple[nn.Parameter, ...]]:
        return {
            n: tuple(dict.fromkeys(p for m in ms for p in m._parameters.values() if p is not None and p.requires_grad))
            for n, ms in self._submodules.items()
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
        evaluator, random = self.evaluator(call), call.random
        draws = any(random.draws(n, module.training) for n, module in self.modules.items())
        with random.preserved(state[0].device) if draws else nullcontext():
            for n in self.modules:
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
        yield ModuleStore({i: self.modules[n] for i, n in enumerate(layers) if n in self.modules})

    def save(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The modules add all themselves."""

    def load(self, state_dict: dict[str, Any], prefix: str, missing: list[str], errors: list[str]) -> None:
        """The modules take up all themselves."""

    def may_have(self, entry: str) -> bool:
        return True
