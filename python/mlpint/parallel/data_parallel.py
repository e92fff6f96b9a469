"""Replicas of a model that train on different parts of the data: the mean of their gradients.

A mesh (``mlpint.init(data=D)``) has D replicas; the ranks of ``comm.data`` hold the same layers and the same copy of
what lies outside the stacks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._core import USER_TAG
from ..comm.agreement import agree
from ..comm.communicator import Comm
from ..comm.sum_in_parts import SumInParts
from .clip import stacks_of
from .replicas import comm_of, describe

_TAG = USER_TAG + 14
_BUCKET = 1 << 25  # bytes that are summed at a time: what this takes in memory beside the gradients


def average_gradients(model: nn.Module, comm: Any = None) -> None:
    """Replaces every gradient by its mean over the replicas of a mesh. Collective.

    After the backward (the last one, where gradients are accumulated), before clipping and the optimiser's step::

        comm = mlpint.init(data=2)
        ...
        loss.backward()
        mlpint.average_gradients(model)
        mlpint.clip_grad_norm_(model, 1.0)
        optimizer.step()

    With a loss that is a mean and replicas that have batches of the same size it is the gradient of the mean over the
    batches of all replicas. Added up in the order of the replicas, so that it is equal to the last bit on all of them.
    Sharded parameters (``DTensor``, of FSDP) are left to those who sharded them.

    Args:
        model: the same on every rank but for its layers.
        comm: as for :class:`LayerParallel`; by default that of the model's first stack.

    Raises:
        RuntimeError: replicas whose gradients are of unlike shapes.
        ValueError: sparse gradients.
    """
    data = comm_of(model, comm).data
    if data.size > 1:
        _average([p for p in model.parameters() if _is_ours(p)], data)


@contextmanager
def averaged_gradients(model: nn.Module, comm: Any = None) -> Iterator[None]:
    """As :func:`average_gradients` at the end of the body, in which the backward runs. Collective.

    ::

        loss = loss_of(model(inputs))
        with mlpint.averaged_gradients(model):
            loss.backward()

    What a rank's layers contribute is on its way as soon as the rank is through with its part of the adjoint, while
    other ranks still are at theirs.
    """
    data = comm_of(model, comm).data
    if data.size == 1:
        yield
        return
    early, stacks = _EarlySums(data), [stack for _, stack in stacks_of(model)]
    for stack in stacks:
        stack.gradients_ready = early.start
    try:
        yield
    finally:
        for stack in stacks:
            stack.gradients_ready = None
    done = early.finish()
    _average([p for p in model.parameters() if _is_ours(p) and p not in done], data)


def _is_ours(parameter: nn.Parameter) -> bool:
    sharding = sys.modules.get("torch.distributed.tensor")  # which takes most of a second to import
    return parameter.requires_grad and not (sharding is not None and isinstance(parameter, sharding.DTensor))


def _average(parameters: list[nn.Parameter], data: Comm) -> None:
    agree(data, {"operation": "average_gradients", "parameters": describe(dict(enumerate(parameters)))})
    if any(p.grad is not None and p.grad.layout is not torch.strided for p in parameters):
        raise ValueError("average_gradients: a gradient is sparse; make the embedding with sparse=False")
    # A replica may have no gradient where another has one: a part of the model that its data have not called for.
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float64, device="cpu")
    data.sum_ordered([present])
    for parameter, count in zip(parameters, present.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        torch._foreach_div_(bucket, data.size)  # before the sum, which half precision might not hold
        data.sum_ordered(bucket)


class _EarlySums:
    """Sums over replicas that begin before the backward is over, each rank's own gradients at a time."""

    def __init__(self, data: Comm) -> None:
        self._data = data
        self._under_way: list[tuple[list[nn.Parameter], SumInParts]] = []

    def start(self, gradients: dict[nn.Parameter, torch.Tensor]) -> None:
        """Sends what these parameters will have as their gradients: what they have, and what is added to it."""
        for dtype in dict.fromkeys(g.dtype for g in gradients.values()):
            parameters = [p for p, g in gradients.items() if g.dtype == dtype and _is_ours(p)]
            totals = [gradients[p] if p.grad is None else p.grad + gradients[p] for p in parameters]
            self._under_way.append((parameters, self._data.begin_sum(self._share(totals), _TAG)))

    def finish(self) -> set[nn.Parameter]:
        """Completes the sums; the parameters whose gradients they are."""
        done = set[nn.Parameter]()
        latest = {p: total for parameters, total in self._under_way for p in parameters}
        for parameters, total in self._under_way:
            total.wait()
            # A penalty on weights, or a later pass of the same backward, has added more: that is not in the sum.
            own = [p.grad for p in parameters if p.grad is not None]
            same = len(own) == len(parameters) and torch.equal(self._share(own), total.flat)
            stale = not same or any(latest[p] is not total for p in parameters)
            if self._data.transport.control.sum(float(stale)):
                continue
            total.complete()
            with torch.no_grad():
                for gradient, mean in zip(own, total.flat.split([g.numel() for g in own]), strict=True):
                    gradient.copy_(mean.view_as(gradient))
            done.update(parameters)
        return done

    def _share(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """What a rank contributes to the mean."""
        return torch.cat([(g / self._data.size).flatten() for g in gradients])


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.nbytes
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
