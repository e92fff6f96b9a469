"""Fine steps of a BlockStack: the blocks of all intervals of a rank in one go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..nn import BlockStack, batching
from ..nn.batch_arguments import BatchArguments
from ..nn.block import batched_steps
from ..nn.settings import Weights
from ..nn.step_context import StepContext, for_products
from ..state import State
from .arguments import PerLayer
from .evaluator import GradientSums, LayerCall
from .saved_rows import SavedRows


class Slice(State):
    """One state of several that lie in one tensor, which the next step takes as it is."""

    __slots__ = ("stacked", "index")

    def __init__(self, stacked: torch.Tensor, index: int) -> None:
        super().__init__((stacked[index],))
        self.stacked, self.index = stacked, index


def stacked_states(states: Sequence[State]) -> torch.Tensor:
    """The tensors of several states as one [J, B, T, D]: a view where they lie so already, else a copy."""
    if len(states) == 1:
        return states[0].tensors[0].unsqueeze(0)
    slices = [s for s in states if isinstance(s, Slice)]
    if len(slices) == len(states):
        stacked, start, step = slices[0].stacked, slices[0].index, slices[1].index - slices[0].index
        if step > 0 and all(s.stacked is stacked and s.index == start + i * step for i, s in enumerate(slices)):
            return stacked[start : slices[-1].index + 1 : step]
    return torch.stack([s.tensors[0] for s in states])


def progressions(rows: Iterable[int]) -> list[range]:
    """Ascending rows as ranges with any step, as few as come of taking the longest from the start each time."""
    rows, ranges = list(rows), []
    while rows:
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        count = next((i for i, row in enumerate(rows) if row != rows[0] + i * step), len(rows))
        ranges.append(range(rows[0], rows[0] + (count - 1) * step + 1, step))
        del rows[:count]
    return ranges


def as_slice(rows: range) -> slice:
    return slice(rows.start, rows.stop, rows.step)


Views = tuple[Weights[torch.Tensor], dict[range, Weights[torch.Tensor]]]
_lasting: weakref.WeakKeyDictionary[BlockStack, tuple[list[int], Views]] = weakref.WeakKeyDictionary()


def lasting_views(stack: BlockStack) -> Views:
    """A stack's detached parameters and those views of their rows that passes before had asked for.

    In small networks making them anew would be a twentieth of a pass. Where parameters have moved, they are made anew.
    """
    places = [p.data_ptr() for p in stack.weights().present()]
    if stack not in _lasting or _lasting[stack][0] != places:
        _lasting[stack] = places, (stack.weights().map(torch.detach), {})
    return _lasting[stack][1]


class StackEvaluator:
    """As :class:`mlpint.layers.evaluator.LayerEvaluator`, for the rows of a :class:`BlockStack` that are this rank's.

    What a block has saved for its backward, and the gradients inside it once its input's has been taken, are kept
    with the leading dimension they were computed with; see :class:`mlpint.layers.saved_rows.SavedRows`.
    """

    finishes_on_chain = False  # there the blocks of several intervals would no more be finished at once

    def __init__(self, stack: BlockStack, call: LayerCall) -> None:
        self.stack, self.call = stack, call
        self.arguments = batch_arguments(*call.arguments, call.single)
        self.evaluations, self.recompute = call.stats.evaluations, call.recompute
        self.where = ""
        self.gradients = GradientSums()
        self._step = batched_steps(stack.settings)
        self._indices = stack.indices
        self._rows = {n: i for i, n in enumerate(stack.indices)}
        self._parameters = stack.weights()
        self._cast: Weights[torch.Tensor] | None = None
        self._weights: dict[range, Weights[torch.Tensor]] = {}
        self._keys: dict[int, int] = {}
        self._saved, self._inner = SavedRows(), SavedRows()

    # --- what the propagators call -----------------------------------------------------------------------------------

    def forward(self, layers: Sequence[int], states: Sequence[State], level: int, is_final: bool) -> list[State]:
        record = is_final and self.call.record

        def step(call: StepContext, rows: range, x: torch.Tensor) -> torch.Tensor:
            if not record:
                return self._step.forward(call, self._weights_of(rows), x)
            if self.recompute:
                self._saved.put(rows, (x,))
                return self._step.forward(call, self._weights_of(rows), x)
            out, saved = self._step.forward_train(call, self._weights_of(rows), x)
            self._saved.put(rows, saved)
            return out

        self._count("forward", level, len(layers))
        return self._batched(layers, states, step, watched=True)

    def input_vjp(self, layers: Sequence[int], states: Sequence[State], level: int, is_final: bool) -> list[State]:
        def step(call: StepContext, rows: range, grad: torch.Tensor) -> torch.Tensor:
            saved = self._saved_of(call, rows, level)
            dx, inner = self._step.input_vjp(call, self._weights_of(rows), saved, grad)
            if is_final and not self.recompute:
                self._inner.put(rows, inner)
            return dx

        self._count("input_vjp", level, len(layers))
        return self._batched(layers, states, step)

    def finish(
        self, layers: Sequence[int], states: Sequence[State], known: Sequence[State | None], level: int
    ) -> list[State]:
        # With recompute the gradients inside that an earlier product had were not kept.
        inner_is_kept = [gradient is not None and not self.recompute for gradient in known]
        computed: dict[int, State] = {}

        def finish(call: StepContext, rows: range, grad: torch.Tensor) -> torch.Tensor:
            saved, weights = self._saved_of(call, rows, level), self._weights_of(rows)
            dx, inner = self._step.input_vjp(call, weights, saved, grad)
            self._weight_vjp(call, rows, saved, inner)
            self._saved.drop(rows)
            self._inner.drop(rows)
            return dx

        def finish_known(call: StepContext, rows: range, grad: torch.Tensor) -> torch.Tensor:
            saved, inner = self._saved.get(rows), self._inner.get(rows)
            self._weight_vjp(call, rows, saved, inner)
            self._saved.drop(rows)
            self._inner.drop(rows)
            return grad

        for is_kept, step in ((False, finish), (True, finish_known)):
            which = [i for i in range(len(layers)) if inner_is_kept[i] == is_kept]
            if not which:
                continue
            if not is_kept:
                self._count("input_vjp", level, len(which))
            self._count("parameter_vjp", level, len(which))
            gradients = self._batched([layers[i] for i in which], [states[i] for i in which], step)
            computed.update(zip(which, gradients, strict=True))
        return [gradient or computed[i] for i, gradient in enumerate(known)]

    # --- parts -------------------------------------------------------------------------------------------------------

    def _batched(
        self,
        layers: Sequence[int],
        states: Sequence[State],
        step: Callable[[StepContext, range, torch.Tensor], torch.Tensor],
        watched: bool = False,
    ) -> list[State]:
        """A step of every layer, as many at once as pays."""
        self.where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
        place = {self._rows[n]: i for i, n in enumerate(layers)}
        results: list[Any] = [None] * len(layers)
        first = states[0].tensors[0]
        self.arguments.check(self.stack.settings, first)
        width = batching.width(len(layers), first.shape[0] * first.shape[1], first.shape[2], first.device)
        h = self.stack.settings.step_size * self.call.step_size_of(layers[0])
        with torch.no_grad(), self._without_autocast(first.device):
            for evenly_spaced in progressions(sorted(place)):
                for start in range(0, len(evenly_spaced), width):
                    rows = evenly_spaced[start : start + width]
                    x = stacked_states([states[place[row]] for row in rows])
                    indices = (self._indices[row] for row in rows)
                    attending = self.arguments.attending(self.stack.settings, indices, *x.shape[1:3])
                    rotation = self.arguments.rotation
                    call = StepContext(self.stack.settings, attending, self._keys_of(rows), h, rotation)
                    y = step(call, rows, x.flatten(1, 2)).view(x.shape)
                    for i, row in enumerate(rows):
                        results[place[row]] = Slice(y, i)
        if watched and self.stack.watch:
            for n, state, result in zip(layers, states, results, strict=True):
                self.stack.watch(n, state.tensors[0], result.tensors[0])
        return results

    @staticmethod
    def _without_autocast(device: torch.device) -> AbstractContextManager:
        """The steps cast for themselves."""
        return torch.autocast(device.type, enabled=False)

    def _weights_of(self, rows: range) -> Weights[torch.Tensor]:
        """Views of the stacked parameters, cast where autocast is on: all of them, once in a pass."""
        if self._cast is None:
            if self.call.autocast_dtype is None:
                self._cast, self._weights = lasting_views(self.stack)
            else:
                self._cast = for_products(self._parameters.map(torch.detach), self.call.autocast_dtype)
        if rows not in self._weights:
            self._weights[rows] = self._cast.map(lambda p: p[as_slice(rows)])
        return self._weights[rows]

    def _weight_vjp(
        self, call: StepContext, rows: range, saved: tuple[torch.Tensor, ...], inner: tuple[torch.Tensor, ...]
    ) -> None:
        into = self._into(rows)
        if not self.call.adds:
            self._step.weight_vjp(call, self._weights_of(rows), saved, inner, into)
            return
        found = into.map(torch.empty_like)
        self._step.weight_vjp(call, self._weights_of(rows), saved, inner, found)
        for total, gradient in zip(into, found, strict=True):
            if total is not None and gradient is not None:
                total += gradient

    def _into(self, rows: range) -> Weights[torch.Tensor | None]:
        """Where the gradients of these rows go."""
        for p in self._parameters.present():
            if p.requires_grad and p not in self.gradients:
                make = torch.zeros_like if self.call.adds else torch.empty_like
                self.gradients[p] = make(p, memory_format=torch.contiguous_format)
        return self._parameters.map(lambda p: self.gradients[p][as_slice(rows)] if p.requires_grad else None)

    def _saved_of(self, call: StepContext, rows: range, level: int) -> tuple[torch.Tensor, ...]:
        if not self.recompute:
            return self._saved.get(rows)
        self._count("forward", level, len(rows))
        return self._step.forward_train(call, self._weights_of(rows), *self._saved.get(rows))[1]

    def _keys_of(self, rows: range) -> list[int] | None:
        """The dropout keys that blocks on their own would draw."""
        if not self.stack.drops:
            return None
        for row in rows:
            if row not in self._keys:
                self._keys[row] = self.call.random.key_of(*self.call.key, self._indices[row])
        return [self._keys[row] for row in rows]

    def _count(self, kind: str, level: int, count: int) -> None:
        self.evaluations[kind][level] += count


def batch_arguments(args: tuple, kwargs: dict[str, Any], single: bool) -> BatchArguments:
    """What blocks take beside their state."""
    known = {"lengths", "attention_mask", "rotation"}
    if not single or len(args) > 1 or set(kwargs) - known or args and "lengths" in kwargs:
        passed = "a tuple as its state" if not single else f"{len(args)} arguments and {sorted(kwargs)}"
        raise TypeError(
            f"a BlockStack takes x, one tensor, and {', '.join(sorted(known))}; it was given {passed}; use an "
            "nn.ModuleList of layers"
        )
    lengths, rotation = args[0] if args else kwargs.get("lengths"), kwargs.get("rotation")
    if isinstance(lengths, PerLayer) or isinstance(rotation, PerLayer):
        raise TypeError("the blocks of a BlockStack share their lengths and rotation; use an nn.ModuleList of layers")
    masks = kwargs.get("attention_mask")
    return BatchArguments(lengths, masks.values if isinstance(masks, PerLayer) else masks, rotation)
