"""Replicas of a model that train on different parts of the data: the mean of their gradients.

A mesh (``mlpint.init(data=D)``) has D replicas; the ranks of ``comm.data`` hold the same layers and the same copy of
what lies outside the stacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..comm.agreement import agree
from .replicas import comm_of, describe

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
    if data.size == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
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


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(g.nbytes for g in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
