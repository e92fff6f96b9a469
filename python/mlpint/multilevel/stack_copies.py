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
from .settings import Settings
from .state import ParameterState, check_averaged, placed, prolonged, restricted

Ahead = dict[str, tuple[float, float]]  # what a parent's count of steps stood at after a child, and what that had added


class StackCopies:
    """As :class:`mlpint.multilevel.copies.ModuleCopies`, for stacked parameters.

    A coarse network has stacked parameters of its own, which :meth:`swap` puts in the place of the stack's, in the
    module and in the optimiser's groups.

    Args:
        network: whose copies these are.
        parent_layers: indices of the layers whose rows the stack holds now.
        stack: the stack.
        optimizer, settings, kept: as for ModuleCopies.
        ahead: shared by all copies of a training. A stacked parameter has one count of steps for all its rows; here it
            is kept how far one coarse network has brought it ahead of the rows of the next.
    """

    def __init__(
        self,
        network: Network,
        parent_layers: Sequence[int],
        stack: BlockStack,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        kept: Mapping[Key, ParameterState],
        ahead: Ahead,
    ) -> None:
        self.network, self.stack, self.optimizer, self.settings = network, stack, optimizer, settings
        self.ahead, self._parent = ahead, list(parent_layers)
        self.layers = [n for n in network.layers if n in set(parent_layers)]
        self.rows = [self._parent.index(n) for n in self.layers]
        self.aside = {field: nn.Parameter(p.detach()[self.rows], p.requires_grad) for field, p in self._now().items()}
        self.state = {field: self._start(field, p, kept) for field, p in self._now().items()}
        self._counts = {(f, k): float(v) for f, state in self.state.items() for k, v in state.items() if _is_count(v)}

    def _now(self) -> dict[str, nn.Parameter]:
        return {field: self.stack._parameters[field] for field in Weights._fields}

    def _start(self, field: str, p: nn.Parameter, kept: Mapping[Key, ParameterState]) -> ParameterState:
        how, now = self.settings.state, self.optimizer.state.get(p, {})
        if how == "separate":
            return placed(_stacked([kept.get((n, _name(field)), {}) for n in self.layers]), p)
        if how == "reset":
            return {}
        if how == "restrict":
            check_averaged(f"the stack's {field}", now, p.shape)
        state = {k: v[self.rows] if _by_row(v, p) else v.clone() for k, v in now.items() if v is not None}
        for key, value in state.items():
            after, added = self.ahead.get(f"{self.network.name[:-1]}.{field}.{key}", (None, 0.0))
            if _is_count(value) and float(value) == after:
                value.sub_(added)
        return restricted(state, self.network.ratio) if how == "restrict" else state

    def swap(self) -> None:
        """Puts the copies in the parameters' place, or the parent's back."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        places = {p: (parameters, i) for parameters in groups for i, p in enumerate(parameters)}
        for field, old in self._now().items():
            new = self.aside[field]
            self.stack._parameters[field], self.aside[field] = new, old
            if old in places:
                parameters, i = places[old]
                parameters[i] = new
            now = self.optimizer.state.pop(old, {})
            if self.state[field]:
                self.optimizer.state[new] = self.state[field]
            self.state[field] = now

    @torch.no_grad()
    def prolong(self) -> None:
        """Averages the copies into the parent's rows, which are in place."""
        delta, how = self.settings.delta, self.settings.neighbours
        fine = [p.detach() for p in self._now().values()]
        done = 0
        for rows in progressions(self.rows):
            coarse = [p.detach()[done : done + len(rows)] for p in self.aside.values()]
            done += len(rows)
            for shift in self._neighbours() if how != "none" else ():
                other = range(rows.start + shift, rows.stop + shift, rows.step)
                if how == "average":
                    average_rows(fine, coarse, other, delta)
                else:
                    for f, c in zip(fine, coarse, strict=True):
                        f[as_slice(other)].add_(c - f[as_slice(rows)], alpha=delta)
            average_rows(fine, coarse, rows, delta)
        if self.settings.state in ("restrict", "carry"):
            for field, p in self._now().items():
                self._prolong_state(field, p)

    def _neighbours(self) -> list[int]:
        """How many rows after its own a block stands for others; the same for all."""
        layer, others = self.network.layers[0], self.network.stands_for[0]
        whole = sorted((layer, *others))
        return [whole.index(other) - whole.index(layer) for other in others]

    def _prolong_state(self, field: str, p: nn.Parameter) -> None:
        coarse = self.state[field]
        if not coarse:
            return
        now = self.optimizer.state[p]
        mine = {key: v[self.rows] for key, v in now.items() if _by_row(v, p)}
        if self.settings.state == "restrict":
            coarse = prolonged(mine, coarse, self.network.ratio, self.settings.delta)
        for key, value in coarse.items():
            if _by_row(value, self.aside[field]):
                now.setdefault(key, torch.zeros_like(p, dtype=value.dtype))[self.rows] = value
                continue
            if not _is_count(value):
                now[key] = value
            elif key not in now or value >= now[key]:  # less where none of the network's rows are this rank's
                now[key] = value
                added = float(value) - self._counts.get((field, key), 0.0)
                self.ahead[f"{self.network.name[:-1]}.{field}.{key}"] = (float(value), added)

    # --- for checkpoints, by single layers ---------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[Key, torch.Tensor]]:
        for field, stacked in self.aside.items():
            for i, n in enumerate(self.layers):
                yield (n, _name(field)), stacked.detach()[i]

    def states(self) -> dict[Key, ParameterState]:
        found = {}
        for field, state in self.state.items():
            p = self.aside[field]
            for i, n in enumerate(self.layers):
                found[n, _name(field)] = {k: v[i] if _by_row(v, p) else v.clone() for k, v in state.items()}
        return found

    @torch.no_grad()
    def load(self, weights: Mapping[Key, torch.Tensor], states: Mapping[Key, Any]) -> None:
        for field, stacked in self.aside.items():
            for i, n in enumerate(self.layers):
                stacked[i].copy_(weights[n, _name(field)])
            rows = [states.get((n, _name(field)), {}) for n in self.layers]
            self.state[field] = placed(_stacked(rows), stacked)


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
