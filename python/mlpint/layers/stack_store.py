"""Layers whose parameters are stacked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..nn import BlockStack
from ..nn.batch_arguments import BatchArguments
from .evaluator import LayerCall
from .random_keys import LayerRandom
from .stack_evaluator import StackEvaluator, batch_arguments, no_gradients_wanted


class StackStore:
    """As :class:`mlpint.layers.store.LayerStore`.

    Args:
        stack: the layers of this rank, which is nobody else's. While others have put the parameters of some of its
            layers in the place of its own (:mod:`mlpint.multilevel.stack_copies`), :meth:`select` names these layers.
    """

    def __init__(self, stack: BlockStack) -> None:
        self.stack, self._indices = stack, stack.indices
        self.modules: Mapping[int, nn.Module] = {}
        stack.saved_by_owner = True

    @property
    def example(self) -> BlockStack:
        return self.stack

    def register(self, owner: nn.Module) -> None:
        owner.add_module("stacked", self.stack)

    def trainable_parameters(self) -> dict[int, tuple[nn.Parameter, ...]]:
        indices = self.stack.indices
        return {indices[0]: tuple(p for p in self.stack.weights().present() if p.requires_grad)} if indices else {}

    def by_layer(self, tensors: Mapping[int, tuple[torch.Tensor | None, ...]]) -> dict[int, tuple]:
        indices = self.stack.indices
        stacked = tensors.get(indices[0], ()) if indices else ()
        return {n: tuple(t if t is None else t[i] for t in stacked) for i, n in enumerate(indices)}

    def gradients(self, excluded: Collection[nn.Parameter]) -> dict[int, list[torch.Tensor]]:
        held = [p.grad for p in self.stack.weights().present() if p.grad is not None and p not in excluded]
        return {n: [g[i] for g in held] for i, n in enumerate(self.stack.indices)}

    def evaluator(self, call: LayerCall) -> StackEvaluator:
        arguments, memory = batch_arguments(call)
        no_gradients_wanted(call, memory)
        return StackEvaluator(self.stack, call, arguments, memory)

    def run(self, call: LayerCall, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (self.run_alone(call, state[0], *batch_arguments(call)),)

    def run_alone(
        self, call: LayerCall, x: torch.Tensor, arguments: BatchArguments, memory: torch.Tensor | None
    ) -> torch.Tensor:
        """:meth:`run` for one tensor and what the blocks are told of it."""
        stack = self.stack
        keys = [call.random.key_of(*call.key, n) for n in stack.indices] if stack.drops else None
        return stack.forward_in_turn(x, arguments, keys, [call.step_size_of(n) for n in stack.indices], memory)

    def drawing(self, random: LayerRandom) -> str | None:
        return "the blocks" if self.stack.drops else None

    @contextmanager
    def watched(self, look: Callable[..., None]) -> Iterator[None]:
        self.stack.watch = lambda n, x, y: look(n, "Block", self.stack.row(n), x, y)
        try:
            yield
        finally:
            self.stack.watch = None

    @contextmanager
    def select(self, layers: Sequence[int]) -> Iterator[StackStore]:
        own, before = set(self._indices), self.stack.indices
        self.stack.indices = tuple(i for i, n in enumerate(layers) if n in own)
        try:
            yield self
        finally:
            self.stack.indices = before

    def save(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.stack.save_rows(destination, prefix, keep_vars)

    def load(self, state_dict: dict[str, Any], prefix: str, missing: list[str], errors: list[str]) -> None:
        self.stack.load_rows(state_dict, prefix, missing, errors)

    def may_have(self, layer: int, entry: str) -> bool:
        return entry in self.stack.row_names
