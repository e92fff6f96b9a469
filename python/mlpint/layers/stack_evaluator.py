"""Fine steps of a BlockStack: the blocks of all intervals of a rank in one go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..nn import BlockStack, batching
from ..nn.batch_arguments import BatchArguments
from ..nn.block import batched_steps
from ..nn.settings import Weights
from ..nn.step_context import StepContext, for_products, without_autocast
from ..state import State
from .arguments import PerLayer
from .evaluator import GradientSums, LayerCall
from .saved_rows import SavedRows

Origin = tuple[torch.Tensor, int] | None  # the tensor that one of several states lies in, and its place there


class Slice(State):
    """One state of several that lie in one tensor, or in one for each of theirs, which the next step takes as it is."""

    __slots__ = ("origins",)

    def __init__(self, tensors: Iterable[torch.Tensor], origins: Sequence[Origin]) -> None:
        super().__init__(tensors)
        self.origins = origins


def stacked_states(states: Sequence[State], which: int = 0) -> torch.Tensor:
    """A tensor of several states as one [J, B, T, D]: a view where they lie so already, else a copy."""
    if len(states) == 1:
        return states[0].tensors[which].unsqueeze(0)
    origins = [s.origins[which] for s in states if isinstance(s, Slice)]
    places = [origin for origin in origins if origin is not None]
    if len(places) == len(states):
        (stacked, start), (_, second) = places[:2]
        step = second - start
        if step > 0 and all(t is stacked and i == start + k * step for k, (t, i) in enumerate(places)):
            return stacked[start : places[-1][1] + 1 : step]
    return torch.stack([s.tensors[which] for s in states])


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


Stepped = tuple[torch.Tensor, torch.Tensor | None]  # what a step gives, and the gradient for its memory if any
Step = Callable[[StepContext, range, torch.Tensor], Stepped]


class StackEvaluator:
    """As :class:`mlpint.layers.evaluator.LayerEvaluator`, for the rows of a :class:`BlockStack` that are this rank's.

    What a block has saved for its backward, and the gradients inside it once its input's has been taken, are kept
    with the leading dimension they were computed with; see :class:`mlpint.layers.saved_rows.SavedRows`.

    Args:
        stack: this rank's layers.
        call: what they are called with.
        arguments: what they are told of the batch.
        memory: what all of them attend to, [B, S, D]; where it needs gradients they are this evaluator's, too.
        moves: which tensor of the state they move.
        remembers: which one they attend to; None where it is none of the state's.
    """

    finishes_on_chain = False  # there the blocks of several intervals would no more be finished at once

    def __init__(
        self,
        stack: BlockStack,
        call: LayerCall,
        arguments: BatchArguments,
        memory: torch.Tensor | None = None,
        moves: int = 0,
        remembers: int | None = None,
    ) -> None:
        self.stack, self.call, self.arguments, self.memory = stack, call, arguments, memory
        self._moves, self._remembers = moves, remembers
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

        def step(call: StepContext, rows: range, x: torch.Tensor) -> Stepped:
            if not record:
                return self._step.forward(call, self._weights_of(rows), x), None
            if self.recompute:
                self._saved.put(rows, (x,) if call.memory is None else (x, call.memory))
                return self._step.forward(call, self._weights_of(rows), x), None
            out, saved = self._step.forward_train(call, self._weights_of(rows), x)
            self._saved.put(rows, saved)
            return out, None

        self._count("forward", level, len(layers))
        return self._batched(layers, states, step, watched=True)

    def input_vjp(self, layers: Sequence[int], states: Sequence[State], level: int, is_final: bool) -> list[State]:
        def step(call: StepContext, rows: range, grad: torch.Tensor) -> Stepped:
            saved = self._saved_of(call, rows, level)
            dx, inner = self._step.input_vjp(call, self._weights_of(rows), saved, grad)
            if is_final and not self.recompute:
                self._inner.put(rows, inner)
            return dx, self._of_memory(inner)

        self._count("input_vjp", level, len(layers))
        return self._batched(layers, states, step)

    def finish(
        self, layers: Sequence[int], states: Sequence[State], known: Sequence[State | None], level: int
    ) -> list[State]:
        # With recompute the gradients inside that an earlier product had were not kept.
        inner_is_kept = [gradient is not None and not self.recompute for gradient in known]
        computed: dict[int, State] = {}

        def finish(call: StepContext, rows: range, grad: torch.Tensor) -> Stepped:
            saved, weights = self._saved_of(call, rows, level), self._weights_of(rows)
            dx, inner = self._step.input_vjp(call, weights, saved, grad)
            self._finish(call, rows, saved, inner)
            return dx, self._of_memory(inner)

        def finish_known(call: StepContext, rows: range, grad: torch.Tensor) -> Stepped:
            self._finish(call, rows, self._saved.get(rows), self._inner.get(rows))
            return grad, None

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
        self, layers: Sequence[int], states: Sequence[State], step: Step, watched: bool = False
    ) -> list[State]:
        """A step of every layer, as many at once as pays."""
        self.where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
        place = {self._rows[n]: i for i, n in enumerate(layers)}
        results: list[Any] = [None] * len(layers)
        first, settings = states[0].tensors[self._moves], self.stack.settings
        self.arguments.check(
            settings, first, self.memory if self._remembers is None else states[0].tensors[self._remembers]
        )
        width = batching.width(len(layers), first.shape[0] * first.shape[1], first.shape[2], first.device)
        h = settings.step_size * self.call.step_size_of(layers[0])
        with torch.no_grad(), without_autocast(first.device):
            for evenly_spaced in progressions(sorted(place)):
                for start in range(0, len(evenly_spaced), width):
                    rows = evenly_spaced[start : start + width]
                    these = [states[place[row]] for row in rows]
                    x = stacked_states(these, self._moves)
                    memory = self._memories(these)
                    indices = (self._indices[row] for row in rows)
                    call = StepContext.of(
                        settings, self.arguments, indices, x.shape[1:], self._keys_of(rows), h, memory
                    )
                    y, of_memory = step(call, rows, x.flatten(1, 2))
                    if memory is not None and self._remembers is not None and of_memory is not None:
                        memory = memory + of_memory.view_as(memory)
                    for row, new in zip(rows, self._results(these, y.view(x.shape), memory), strict=True):
                        results[place[row]] = new
        if watched and self.stack.watch:
            for n, state, result in zip(layers, states, results, strict=True):
                self.stack.watch(n, state.tensors[self._moves], result.tensors[self._moves])
        return results

    def _memories(self, states: Sequence[State]) -> torch.Tensor | None:
        """What the layers attend to, [J, B, S, D]; of a way back the gradient that goes with it."""
        if self._remembers is not None:
            return stacked_states(states, self._remembers)
        return None if self.memory is None else self.memory.detach().expand(len(states), *self.memory.shape)

    def _results(self, states: Sequence[State], moved: torch.Tensor, memory: torch.Tensor | None) -> list[State]:
        """States with one tensor new, and the one that is attended to where it lies now."""
        if len(states[0].tensors) == 1:
            return [Slice((moved[i],), ((moved, i),)) for i in range(len(states))]
        new: list[State] = []
        for i, state in enumerate(states):
            tensors = list(state.tensors)
            origins: list[Origin] = list(state.origins) if isinstance(state, Slice) else [None] * len(tensors)
            tensors[self._moves], origins[self._moves] = moved[i], (moved, i)
            if self._remembers is not None and memory is not None:
                tensors[self._remembers], origins[self._remembers] = memory[i], (memory, i)
            new.append(Slice(tensors, origins))
        return new

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

    def _of_memory(self, inner: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Of the gradients inside steps the one for what they attend to."""
        return inner[-1] if self.stack.settings.cross else None

    def _finish(
        self, call: StepContext, rows: range, saved: tuple[torch.Tensor, ...], inner: tuple[torch.Tensor, ...]
    ) -> None:
        """Adds up the gradients of the parameters and of a memory that is not the state's, and frees what was kept."""
        into, weights = self._into(rows), self._weights_of(rows)
        if not self.call.adds:
            self._step.weight_vjp(call, weights, saved, inner, into)
        else:
            found = into.map(torch.empty_like)
            self._step.weight_vjp(call, weights, saved, inner, found)
            for total, gradient in zip(into, found, strict=True):
                if total is not None and gradient is not None:
                    total += gradient
        of_memory = self._of_memory(inner)
        if of_memory is not None and self.memory is not None and self.memory.requires_grad:
            gradient = of_memory.sum(0).view_as(self.memory).to(self.memory.dtype)
            # The memory is one of the call's extra tensors, or the slice of one that goes with a slice of the batch.
            leaves = torch.autograd.grad(self.memory, self.call.extras, gradient, retain_graph=True, allow_unused=True)
            for leaf, part in zip(self.call.extras, leaves, strict=True):
                if part is not None:
                    self.gradients.add(leaf, part)
        self._saved.drop(rows)
        self._inner.drop(rows)

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
        x, *memory = self._saved.get(rows)
        call.memory = memory[0] if memory else None
        return self._step.forward_train(call, self._weights_of(rows), x)[1]

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


def batch_arguments(call: LayerCall) -> tuple[BatchArguments, torch.Tensor | None]:
    """What blocks take beside their state, and their memory.

    Raises:
        TypeError: other arguments, or ones that differ from layer to layer where blocks have them in common.
    """
    args, kwargs = call.arguments
    known = {"lengths", "attention_mask", "rotation", "memory", "memory_lengths"}
    if not call.single or len(args) > 1 or set(kwargs) - known or args and "lengths" in kwargs:
        passed = "a tuple as its state" if not call.single else f"{len(args)} arguments and {sorted(kwargs)}"
        raise TypeError(
            f"a BlockStack takes x, one tensor, and {', '.join(sorted(known))}; it was given {passed}; use an "
            "nn.ModuleList of layers"
        )
    given = {"lengths": args[0]} | kwargs if args else kwargs
    for name, argument in given.items():
        if name != "attention_mask" and isinstance(argument, PerLayer):
            raise TypeError(f"the blocks of a BlockStack share their {name}; use an nn.ModuleList of layers")
    masks = given.get("attention_mask")
    masks = masks.values if isinstance(masks, PerLayer) else masks
    arguments = BatchArguments(given.get("lengths"), masks, given.get("rotation"), given.get("memory_lengths"))
    return arguments, given.get("memory")


def no_gradients_wanted(call: LayerCall, memory: torch.Tensor | None) -> None:
    """Raises a TypeError where gradients are wanted for what blocks are told of a batch, but for their memory."""
    for name, argument in call.arguments[1].items():  # what comes by its place is lengths, integers
        leaves = argument.values if isinstance(argument, PerLayer) else pytree.tree_leaves(argument)
        if call.record and any(isinstance(t, torch.Tensor) and t.requires_grad and t is not memory for t in leaves):
            raise TypeError(
                f"{name} requires gradients, which the blocks of a BlockStack give for their memory alone: pass "
                f"{name}.detach(), or use an nn.ModuleList of blocks"
            )
