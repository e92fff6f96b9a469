"""Random numbers that belong to (seed, step, microbatch, layer), whoever evaluates the layer and however often.

A layer with dropout must draw the same mask in every relaxation, on every level, in the adjoint and for any number of
ranks; two steps, microbatches or layers must draw different ones. So the generators are seeded with a key before each
evaluation, and the state that the user's own random numbers continue from is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..nn.random_keys import draw_key, key


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    # While a CUDA graph is captured nobody may touch the GPU's generator.
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators


class LayerRandom:
    """Seeds the generators of a device layer by layer, and notes which layers used them.

    Every evaluation is seeded, also that of a layer which has not drawn so far: it may draw only for some batches, or
    its dropout may be switched on later.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._draws: dict[tuple[int, bool], bool] = {}  # (layer, training) -> whether it draws random numbers
        self._layers: Sequence[int] | None = None  # the numbers that _draws has for the layers; None: their own

    def forget(self) -> None:
        """After a change that may alter what layers draw (train or eval mode)."""
        self._draws.clear()

    def select(self, layers: Sequence[int]) -> LayerRandom:
        """For a network made of some of the layers, which draw by the numbers 0, 1, ... that they have in there."""
        selection = LayerRandom(self.seed)
        selection._draws, selection._layers = self._draws, layers
        return selection

    @contextmanager
    def preserved(self, device: torch.device) -> Iterator[None]:
        """Puts the generators' states back at the end, where layers draw random numbers."""
        generators = _generators(device)
        states = [g.get_state() for g in generators]
        try:
            yield
        finally:
            for g, s in zip(generators, states, strict=True):
                g.set_state(s)

    def draws(self, layer: int, training: bool) -> bool:
        """Whether the layer drew random numbers in its first evaluation in that mode; true before it."""
        return self._draws.get(self._place(layer, training), True)

    def _place(self, layer: int, training: bool) -> tuple[int, bool]:
        return (layer if self._layers is None else self._layers[layer]), training

    def key_of(self, step: int, microbatch: int, layer: int) -> int:
        """The key that a block of :mod:`mlpint.nn` would draw under :meth:`keyed`, without touching torch's."""
        return draw_key(torch.Generator().manual_seed(key(self.seed, step, microbatch, layer)))

    @contextmanager
    def keyed(self, step: int, microbatch: int, layer: int, training: bool, device: torch.device) -> Iterator[None]:
        """Evaluates one layer under its key; only inside :meth:`preserved`."""
        generators = _generators(device)
        value = key(self.seed, step, microbatch, layer)
        for g in generators:
            g.manual_seed(value)
        place = self._place(layer, training)
        if place in self._draws:
            yield
            return
        before = [g.get_state() for g in generators]
        yield
        after = [g.get_state() for g in generators]
        self._draws[place] = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
