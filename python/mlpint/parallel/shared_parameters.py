"""What ranks hold together: parameters shared by layers of several ranks, and the state dict of the whole stack."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._core import USER_TAG
from ..comm.agreement import agree
from ..comm.communicator import Comm
from ..state import State

_TAG = USER_TAG + 1


class SharedParameters:
    """Parameters that belong to layers of several ranks (one module used by several layers, tied weights).

    Each of those ranks holds a replica. They start equal and stay equal because each gets the same summed gradient,
    added up in rank order on the lowest of them.

    Attributes:
        parameters: own parameters that other ranks hold too, with the ranks that do.
    """

    def __init__(self, layers: list[nn.Module], rank_of: Callable[[int], int], comm: Comm) -> None:
        holders: dict[nn.Parameter, set[int]] = {}
        for n, layer in enumerate(layers):
            for parameter in layer.parameters():
                holders.setdefault(parameter, set()).add(rank_of(n))
        modules: dict[nn.Module, set[int]] = {}
        for n, layer in enumerate(layers):
            for module in layer.modules():
                modules.setdefault(module, set()).add(rank_of(n))
        self._comm = comm
        self._modules = [
            (module, [*module.parameters()])
            for module, ranks in modules.items()
            if len(ranks) > 1 and comm.rank in ranks
        ]
        self.parameters = [
            (parameter, sorted(ranks)) for parameter, ranks in holders.items() if len(ranks) > 1 and comm.rank in ranks
        ]

    def check(self) -> None:
        """Refuses modules of several ranks' layers whose parameters have been added or replaced on each rank apart."""
        for module, before in self._modules:
            if {*map(id, before)} != {*map(id, module.parameters())}:
                raise RuntimeError(
                    f"parameters of a {type(module).__name__} that layers of several ranks share were added or "
                    "replaced after the stack was made: each rank would train its own. Do it before"
                )

    def sum(self, gradients: dict[torch.Tensor, torch.Tensor]) -> None:
        transport, me = self._comm.transport, self._comm.rank
        for parameter, ranks in self.parameters:
            if not parameter.requires_grad:
                continue
            mine = gradients.get(parameter)
            total = State([torch.zeros_like(parameter) if mine is None else mine.clone()])
            first, others = ranks[0], ranks[1:]
            if me == first:
                for other in others:
                    arrived = total.empty_like()
                    transport.receive(other, _TAG, arrived).wait(transport.stall_limit)
                    total = State([total.tensors[0] + arrived.tensors[0]])
                for other in others:
                    transport.post(other, _TAG, total)
                transport.flush()
            else:
                transport.post(first, _TAG, total)
                transport.flush()
                transport.receive(first, _TAG, total).wait(transport.stall_limit)
            gradients[parameter] = total.tensors[0]


def gather_state_dict(local: dict[str, torch.Tensor], comm: Comm, prefix: str) -> OrderedDict[str, torch.Tensor]:
    """Every rank's entries on every rank, in the order of the layers; see also :func:`on_first_rank`. Collective."""
    agree(comm, {"operation": "state_dict", "prefix": prefix, "on the first rank alone": str(_on_first)})
    tensors = _gather_on_first(local, comm) if _on_first else gather_tensors(local, comm)
    order = sorted(tensors, key=lambda name: int(name[len(prefix) :].split(".", 1)[0]))
    gathered: OrderedDict[str, Any] = OrderedDict((name, tensors[name]) for name in order)
    if hasattr(local, "_metadata"):
        gathered._metadata = local._metadata  # type: ignore[attr-defined]
    return gathered


_on_first = False


@contextmanager
def on_first_rank() -> Iterator[None]:
    """Inside, what state dicts have of other ranks' layers goes to rank 0 alone, into host memory."""
    global _on_first
    _on_first = True
    try:
        yield
    finally:
        _on_first = False


def _gather_on_first(local: dict[str, torch.Tensor], comm: Comm) -> dict[str, torch.Tensor]:
    """Every rank's tensors in rank 0's host memory; elsewhere a rank's own."""
    if comm.size == 1:
        return dict(local)
    transport = comm.transport.control
    own = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in local.items()]
    entries = [json.loads(message) for message in comm.gather(json.dumps(own).encode())]
    if comm.rank > 0:
        for tensor in local.values():  # one at a time: a copy on the host of one tensor is all that this takes
            if tensor.numel():
                transport.post(0, _TAG, State([tensor.detach().cpu()]))
                transport.flush()
        return dict(local)
    tensors = {name: tensor.detach().cpu() for name, tensor in local.items()}
    for owner in range(1, comm.size):
        for name, shape, dtype in entries[owner]:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            if tensor.numel():
                transport.receive(owner, _TAG, State([tensor])).wait(transport.stall_limit)
            tensors.setdefault(name, tensor)
    return tensors


def gather_tensors(local: dict[str, torch.Tensor], comm: Comm) -> dict[str, torch.Tensor]:
    """Every rank's tensors on every rank, by rank; of one name the last rank's. Collective."""
    tensors: dict[str, torch.Tensor] = {}
    for owner in range(comm.size):
        entries = [[k, list(t.shape), str(t.dtype).removeprefix("torch."), t.device.type] for k, t in local.items()]
        entries = json.loads(_broadcast_text(json.dumps(entries), owner, comm))
        for name, shape, dtype, device in entries:
            if owner == comm.rank:
                tensor = local[name]
            else:
                # Where the owner has it, not where this rank's GPU is: host and GPU memory take different transports.
                place = comm.device if device == comm.device.type else device
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=place)
            if comm.size > 1 and tensor.numel():
                comm.transport.broadcast(State([tensor.detach()]), owner)
            tensors[name] = tensor
    return tensors


def _broadcast_text(text: str, owner: int, comm: Comm) -> str:
    if comm.size == 1:
        return text
    control = comm.transport.control
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)], device="cpu")
    control.broadcast(State([size]), owner)
    if comm.rank != owner:
        data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
    control.broadcast(State([data]), owner)
    return data.numpy().tobytes().decode()
