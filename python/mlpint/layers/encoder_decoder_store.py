"""The layers of an encoder-decoder with stacked parameters, and what evaluates those of either kind at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from ..nn import EncoderDecoder
from ..nn.batch_arguments import BatchArguments
from ..nn.encoder_decoder import as_pair
from ..state import State
from .arguments import PerLayer
from .divided_evaluator import DividedEvaluator, Known, Step
from .evaluator import GradientSums, LayerCall
from .random_keys import LayerRandom
from .stack_evaluator import StackEvaluator
from .stack_store import StackStore

TWO_KINDS = "the layers of an encoder-decoder are of two kinds: coarse networks need blocks of one shape"


class EncoderDecoderStore:
    """As :class:`mlpint.layers.store.LayerStore`.

    Args:
        layers: those of this rank, which are nobody else's.
    """

    def __init__(self, layers: EncoderDecoder) -> None:
        self.stores = StackStore(layers.encoder), StackStore(layers.decoder)
        self._layers, self.encoder_layers = layers, layers.encoder_layers
        self.modules: Mapping[int, nn.Module] = {}

    @property
    def example(self) -> EncoderDecoder:
        return self._layers  # of two kinds

    def register(self, owner: nn.Module) -> None:
        for name, store in zip(("stacked_encoder", "stacked_decoder"), self.stores, strict=True):
            owner.add_module(name, store.stack)

    def trainable_parameters(self) -> dict[int, tuple[nn.Parameter, ...]]:
        return {n: ps for store in self.stores for n, ps in store.trainable_parameters().items()}

    def by_layer(self, tensors: Mapping[int, tuple[torch.Tensor | None, ...]]) -> dict[int, tuple]:
        return {n: parts for store in self.stores for n, parts in store.by_layer(tensors).items()}

    def gradients(self, excluded: Collection[nn.Parameter]) -> dict[int, list[torch.Tensor]]:
        return {n: gradients for store in self.stores for n, gradients in store.gradients(excluded).items()}

    def evaluator(self, call: LayerCall) -> EncoderDecoderEvaluator:
        lengths = _lengths(call)
        encoder, decoder = self.stores
        return EncoderDecoderEvaluator(
            StackEvaluator(encoder.stack, call, BatchArguments(lengths)),
            StackEvaluator(decoder.stack, call, BatchArguments(memory_lengths=lengths), moves=1, remembers=0),
            self.encoder_layers,
        )

    def run(self, call: LayerCall, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        lengths, (x, y), (encoder, decoder) = _lengths(call), as_pair(state), self.stores
        x = encoder.run_alone(call, x, BatchArguments(lengths), None)
        return x, decoder.run_alone(call, y, BatchArguments(memory_lengths=lengths), x)

    def drawing(self, random: LayerRandom) -> str | None:
        return next(filter(None, (store.drawing(random) for store in self.stores)), None)

    @contextmanager
    def watched(self, look: Callable[..., None]) -> Iterator[None]:
        with ExitStack() as leaving:
            for store in self.stores:
                leaving.enter_context(store.watched(look))
            yield

    def select(self, layers: Sequence[int]) -> NoReturn:
        raise ValueError(TWO_KINDS)

    def save(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for store in self.stores:
            store.save(destination, prefix, keep_vars)

    def load(self, state_dict: dict[str, Any], prefix: str, missing: list[str], errors: list[str]) -> None:
        for store in self.stores:
            store.load(state_dict, prefix, missing, errors)

    def may_have(self, layer: int, entry: str) -> bool:
        return self.stores[layer >= self.encoder_layers].may_have(layer, entry)


class EncoderDecoderEvaluator(DividedEvaluator):
    """As :class:`mlpint.layers.evaluator.LayerEvaluator`, made of one for the encoder and one for the decoder."""

    finishes_on_chain = False

    def __init__(self, encoder: StackEvaluator, decoder: StackEvaluator, encoder_layers: int) -> None:
        self._parts, self._encoder_layers = (encoder, decoder), encoder_layers
        super().__init__(encoder)
        self.gradients = encoder.gradients

    @property
    def gradients(self) -> GradientSums:
        return self._parts[0].gradients

    @gradients.setter
    def gradients(self, sums: GradientSums) -> None:
        for part in self._parts:
            part.gradients = sums

    def _divide(self, layers: Sequence[int], states: Sequence[State], known: Known, step: Step) -> list[State]:
        as_pair(states[0].tensors)
        results: dict[int, State] = {}
        for which, part in enumerate(self._parts):
            own = [j for j, n in enumerate(layers) if (n >= self._encoder_layers) == bool(which)]
            results |= self._stepped(part, own, layers, states, known, step)
        return [results[j] for j in range(len(layers))]


def _lengths(call: LayerCall) -> torch.Tensor | None:
    """What the layers take beside their state."""
    args, kwargs = call.arguments
    if call.single or len(args) > 1 or set(kwargs) - {"lengths"} or args and kwargs:
        passed = "one tensor as its state" if call.single else f"{len(args)} arguments and {sorted(kwargs)}"
        raise TypeError(f"an EncoderDecoder takes the pair (X, Y) and lengths; it was given {passed}")
    lengths = args[0] if args else kwargs.get("lengths")
    if isinstance(lengths, PerLayer):
        raise TypeError("the layers of an EncoderDecoder share their lengths")
    return lengths
