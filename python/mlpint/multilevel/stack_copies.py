"""The rows of a BlockStack's parameters that a coarse network trains, while its parent keeps its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layers.stack_evaluator import as_slice, progressions
from ..nn import BlockStack
from ..nn.kernels import kernel
from ..nn.settings import NAMES, Weights
from .copies import Key
from .hierarchy import Network
from .optimizer_state import ParameterState, check_averaged, placed, prolonged, restricted
from .options import MultilevelOptions

Ahead = dict[str, tuple[float, float]]  # what a parent's count of steps stood at after a child, and what that had added


class StackCopies:
    """A coarse network's own stacked parameters, and the optimiser's state for them.

    :meth:`swap` puts them in the place of the stack's, in the module and in the optimiser's groups.

    Args:
        network: whose copies these are.
        parent_layers: indices of the layers whose rows the stack holds now.
        stack: the stack.
        optimizer: the user's.
        options: those of the training.
        ahead: shared by all copies of a training. A stacked parameter has one count of steps for all its rows; here it
            is kept how far one coarse network has brought it ahead of the rows of the next.
    """

    def __init__(
        self,
        network: Network,
        parent_layers: Sequence[int],
        stack: BlockStack,
        optimizer: torch.optim.Optimizer,
        options: MultilevelOptions,
        ahead: Ahead,
    ) -> None:
        self.network, self.stack, self.optimizer, self.options = network, stack, optimizer, options
        self.ahead = ahead
        self.layers = [n for n in network.layers if n in set(parent_layers)]
        self.rows = [list(parent_layers).index(n) for n in self.layers]
        self.stored = {
            field: nn.Parameter(p.detach()[self.rows], p.requires_grad) for field, p in self._in_place().items()
        }
        self.stored_state = {field: self._start(field, p) for field, p in self._in_place().items()}
        self._counts = {
            (field, key): float(value)
            for field, state in self.stored_state.items()
            for key, value in state.items()
            if _is_count(value)
        }

    def _in_place(self) -> dict[str, nn.Parameter]:
        weights = self.stack.weights()._asdict()
        return {field: p for field, p in weights.items() if p is not None}

    def _start(self, field: str, p: nn.Parameter) -> ParameterState:
        parent = self.optimizer.state.get(p, {})
        restrict = self.options.state == "restrict"
        if restrict:
            check_averaged(f"the stack's {field}", parent, p.shape)
        state = {k: v[self.rows] if _by_row(v, p) else v.clone() for k, v in parent.items() if v is not None}
        for key, value in state.items():
            after, added = self.ahead.get(self._ahead_key(field, key), (None, 0.0))
            if _is_count(value) and float(value) == after:
                value.sub_(added)
        return restricted(state, self.network.ratio) if restrict else state

    def _ahead_key(self, field: str, key: str) -> str:
        """The name in ``ahead`` of a count that the parent keeps of a parameter."""
        return f"{self.network.name[:-1]}.{field}.{key}"

    def swap(self) -> None:
        groups = [group["params"] for group in self.optimizer.param_groups]
        places = {p: (parameters, i) for parameters in groups for i, p in enumerate(parameters)}
        for field, old in self._in_place().items():
            new = self.stored[field]
            self.stack._parameters[field], self.stored[field] = new, old
            if old in places:
                parameters, i = places[old]
                parameters[i] = new
            state = self.optimizer.state.pop(old, {})
            if self.stored_state[field]:
                self.optimizer.state[new] = self.stored_state[field]
            self.stored_state[field] = state

    @torch.no_grad()
    def prolong(self) -> None:
        fine = [p.detach() for p in self._in_place().values()]
        done = 0
        for rows in progressions(self.rows):
            coarse = [p.detach()[done : done + len(rows)] for p in self.stored.values()]
            done += len(rows)
            for shift in self._shifts() if self.options.neighbours == "average" else (0,):
                average_rows(fine, coarse, range(rows.start + shift, rows.stop + shift, rows.step), self.options.delta)
        for field, p in self._in_place().items():
            self._prolong_state(field, p)

    def _shifts(self) -> list[int]:
        """How many rows after a block's own the rows are into which it is averaged; the same for all blocks."""
        layer, others = self.network.layers[0], self.network.stands_for[0]
        group = sorted((layer, *others))
        return [i - group.index(layer) for i in range(len(group))]

    def _prolong_state(self, field: str, p: nn.Parameter) -> None:
        coarse = self.stored_state[field]
        if not coarse:
            return
        parent = self.optimizer.state[p]
        if self.options.state == "restrict":
            rows = {key: value[self.rows] for key, value in parent.items() if _by_row(value, p)}
            coarse = prolonged(rows, coarse, self.network.ratio, self.options.delta)
        for key, value in coarse.items():
            if _by_row(value, self.stored[field]):
                parent.setdefault(key, torch.zeros_like(p, dtype=value.dtype))[self.rows] = value
            elif not _is_count(value):
                parent[key] = value
            elif key not in parent or value >= parent[key]:  # less where none of the network's rows are this rank's
                parent[key] = value
                added = float(value) - self._counts.get((field, key), 0.0)
                self.ahead[self._ahead_key(field, key)] = (float(value), added)

    # --- for checkpoints, by single layers ---------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[Key, torch.Tensor]]:
        for field, stacked in self.stored.items():
            for i, n in enumerate(self.layers):
                yield (n, _name(field)), stacked.detach()[i]

    def states(self) -> dict[Key, ParameterState]:
        return {
            (n, _name(field)): {k: v[i] if _by_row(v, self.stored[field]) else v.clone() for k, v in state.items()}
            for field, state in self.stored_state.items()
            for i, n in enumerate(self.layers)
        }

    @torch.no_grad()
    def load(self, weights: Mapping[Key, torch.Tensor], states: Mapping[Key, Any]) -> None:
        for field, stacked in self.stored.items():
            for i, n in enumerate(self.layers):
                stacked[i].copy_(weights[n, _name(field)])
            rows = [states.get((n, _name(field)), {}) for n in self.layers]
            self.stored_state[field] = placed(_stacked(rows), stacked)


def average_rows(fine: Sequence[torch.Tensor], coarse: Sequence[torch.Tensor], rows: range, delta: float) -> None:
    """``fine[rows] <- (1 - delta) fine[rows] + delta coarse``, in one launch where the Triton kernel is chosen."""
    sizes = [f[0].numel() for f in fine]
    d = min(sizes)
    module = kernel("average", d, max(sizes) // max(d, 1), len(rows), fine[0], *fine, *coarse)
    if module is not None:
        module.average_(fine, coarse, as_slice(rows), delta)
        return
    for f, c in zip(fine, coarse, strict=True):
        f[as_slice(rows)].lerp_(c, delta)


def _name(field: str) -> str:
    """What a block calls a parameter that is a stack's field."""
    return NAMES[Weights._fields.index(field)]


def _by_row(value: Any, p: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == p.shape


def _is_count(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _stacked(states: Sequence[ParameterState]) -> ParameterState:
    """The state of a stacked parameter from those of its rows, which have the same keys."""
    if not states or not states[0]:
        return {}
    return {
        key: value.clone() if _is_count(value) else torch.stack([s[key] for s in states])
        for key, value in states[0].items()
    }
