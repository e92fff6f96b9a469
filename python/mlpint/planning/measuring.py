"""What the parts of a training step take on this machine: a layer, the head, a message. Collective where ranks are."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .._core import USER_TAG
from ..comm.communicator import Comm
from ..layers.batch_slices import BatchSlices
from ..mgrit.options import MGRIT
from ..parallel.layer_parallel import LayerParallel
from ..state import State
from .simulation import Costs

_TAG = USER_TAG + 12
_SECONDS = 0.2  # that one figure may take in a round
_ROUNDS = 3
_SLICES = (2, 4, 8, 16)
_COPIES = 16  # of a layer, so that their weights and what they keep do not stay in a cache as those of one would
# Where there is one rank alone: MPI on one machine.
LATENCY, BYTES_A_SECOND = 20e-6, 5e9


def kept_bytes(layer: nn.Module, state: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> int:
    """What a layer keeps of a batch for its backward, beside its parameters; tensors on the meta device will do."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(state.detach().requires_grad_(), *args, **kwargs)
    del output
    parameters = {p.untyped_storage()._cdata for p in layer.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in parameters)


def measure(
    layer: nn.Module,
    state: torch.Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    whole: Callable[[], torch.Tensor],
    comm: Comm,
) -> Costs:
    """Seconds, medians of the slowest rank; all ranks measure at once, as they will train.

    The figures are taken in turn, several times, since a machine may be slower for a while.

    Args:
        layer: one of the network's, and what it is called with, on the whole batch.
        whole: the loss of a network with this layer alone, for its backward; what it takes beyond that is the head's.
    """
    # What the solver itself adds to an evaluation.
    stack = LayerParallel([copy.deepcopy(layer) for _ in range(_COPIES)], MGRIT(2, _COPIES, 0, 0), comm=comm.data)

    def step() -> None:
        stack(state.detach().requires_grad_(), *args, **kwargs).backward(torch.ones_like(state))

    rounds = []
    for _ in range(_ROUNDS):
        times = {m: _of_layer(layer, *_sliced(state, args, kwargs, m), comm) for m in _counts(len(state))}
        rounds.append((times, _median(step, comm), _median(lambda: whole().backward(), comm)))
    middle = statistics.median
    alone = [times[1][0] + times[1][2] for times, _, _ in rounds]  # the layer's forward and combined vjp
    factor = max(1.0, middle(stacked / _COPIES / one for (_, stacked, _), one in zip(rounds, alone, strict=True)))
    head = max(0.0, middle(loss - one for (_, _, loss), one in zip(rounds, alone, strict=True)))
    times = {m: tuple(map(middle, zip(*(r[0][m] for r in rounds), strict=True))) for m in rounds[0][0]}
    forward, input_vjp, combined = times[1]
    slices = {m: m * sum(ts) / (forward + input_vjp + combined) for m, ts in times.items() if m > 1}
    latency, a_byte = _messages(state, comm)
    own = [forward * factor, input_vjp * factor, combined * factor, head, latency, a_byte * state.nbytes]
    own += [slices[m] for m in slices]
    everyone = [json.loads(message) for message in comm.gather(json.dumps(own).encode())]
    forward, input_vjp, combined, head, latency, transfer, *parts = (max(v) for v in zip(*everyone, strict=True))
    return Costs(forward, input_vjp, combined, dict(zip(slices, parts, strict=True)), latency, transfer, head)


def _counts(samples: int) -> list[int]:
    return [1, *(m for m in _SLICES if m <= samples)]


def _sliced(state: torch.Tensor, args: tuple, kwargs: dict[str, Any], m: int) -> tuple[torch.Tensor, tuple, dict]:
    """The first of m slices."""
    if m == 1:
        return state, args, kwargs
    slices = BatchSlices(len(state), m)
    args, kwargs = pytree.tree_map(lambda a: slices.argument(a, 0), (args, kwargs))
    return slices.slice(State([state]), 0).tensors[0], args, kwargs


def _of_layer(
    layer: nn.Module, state: torch.Tensor, args: tuple, kwargs: dict[str, Any], comm: Comm
) -> tuple[float, float, float]:
    """Forward, input-vjp and combined vjp."""
    x, parameters = state.detach().requires_grad_(), [p for p in layer.parameters() if p.requires_grad]

    def forward() -> torch.Tensor:
        output = layer(x, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def vjp(inputs: list[torch.Tensor]) -> None:
        y = forward()
        torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)

    f = _median(forward, comm)
    return f, _median(lambda: vjp([x]), comm) - f, _median(lambda: vjp([x, *parameters]), comm) - f


def _median(function: Callable[[], Any], comm: Comm) -> float:
    function()
    comm.barrier()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < _SECONDS and len(times) < 200):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    comm.barrier()
    return statistics.median(times)


def _messages(state: torch.Tensor, comm: Comm) -> tuple[float, float]:
    """Latency, and seconds a byte, between the first rank and the last."""
    if comm.size == 1:
        return LATENCY, 1 / BYTES_A_SECOND
    small, large = torch.zeros(1, device=state.device), state.detach().contiguous()
    latency, whole = (_there_and_back(State([tensor]), comm) / 2 for tensor in (small, large))
    return latency, max(whole - latency, 0.0) / large.nbytes


def _there_and_back(state: State, comm: Comm, times: int = 50) -> float:
    transport, ends, durations = comm.transport, (0, comm.size - 1), []
    comm.barrier()
    for _ in range(times if comm.rank in ends else 0):
        other, start = ends[comm.rank == 0], time.perf_counter()
        for sends in (comm.rank == 0, comm.rank != 0):
            if sends:
                transport.post(other, _TAG, state)
                transport.flush()
            else:
                transport.receive(other, _TAG, state.empty_like()).wait(transport.stall_limit)
        durations.append(time.perf_counter() - start)
    comm.barrier()
    return statistics.median(durations) if durations else 0.0
