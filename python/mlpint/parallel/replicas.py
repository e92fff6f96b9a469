"""What every rank holds a copy of: all of a model but the layers of its layer-parallel stacks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._core import USER_TAG
from ..comm.communicator import Comm
from ..state import State
from .clip import stacks_of
from .layer_parallel import LayerParallel

_TAG = USER_TAG + 2
_NAMED = 5  # that a message names


def check_replicas(model: nn.Module, comm: Any = None, *, raises: bool = True) -> list[str]:
    """Refuses parameters and buffers that should be equal on several ranks and are not. Collective.

    Compared bit by bit (by checksums): everything outside the LayerParallel stacks, on all ranks, and parameters that
    layers of several ranks share, on those; in a mesh the layers of all its replicas too. They stay equal as long as
    all ranks compute them alike from equal values. They can drift where a GPU kernel adds up in an order of its own
    (embedding gradients, ``index_add_``, ``torch.use_deterministic_algorithms`` turns these off), where ranks run on
    different machines or library versions, where ranks draw different random numbers (dropout outside the stack), or
    where the training loop gives them different batches or scales.

    Args:
        model: the same on every rank.
        comm: as for :class:`LayerParallel`; by default that of the model's first stack.
        raises: whether a difference is an error; else its names are returned.

    Returns:
        Names in the order of the model, the same on every rank; empty if all is well.

    Raises:
        RuntimeError: on all ranks; names what differs.
    """
    comm = comm_of(model, comm)
    mine = {
        "outside": {name: _digest(t) for name, t in tensors_outside(model).items()},
        "shared": {key: [name, _digest(p)] for key, (name, p, _) in _shared(model).items()},
    }
    if comm.data.size > 1:
        mine["layers"] = {name: _digest(t) for name, t in _of_layers(model).items()}
    theirs = [json.loads(m) for m in comm.world.gather(json.dumps(mine).encode())]
    names = dict.fromkeys(name for t in theirs for name in t["outside"])
    differing = [name for name in names if len({t["outside"].get(name) for t in theirs}) > 1]
    for key in dict.fromkeys(key for t in theirs for key in t["shared"]):
        holders = [t["shared"][key] for t in theirs if key in t["shared"]]
        if len({digest for _, digest in holders}) > 1:
            differing.append(holders[0][0])
    for name in dict.fromkeys(name for t in theirs for name in t.get("layers", ())):
        if len({t["layers"][name] for t in theirs if name in t["layers"]}) > 1 and name not in differing:
            differing.append(name)
    if differing and raises:
        raise RuntimeError(
            f"the ranks' copies differ in {', '.join(differing[:_NAMED])}{' ...' if len(differing) > _NAMED else ''}: "
            "from here on they train different models. mlpint.sync_replicas(model) makes them equal again; the cause "
            "(other batches, an unseeded layer, a GPU kernel without a fixed order) goes on until it is mended"
        )
    return differing


def sync_replicas(model: nn.Module, comm: Any = None) -> None:
    """Makes all replicas equal again: rank 0's values, and the state of its random number generators. Collective.

    Covers what :func:`check_replicas` compares; a parameter that layers of several ranks share gets the value of the
    lowest of them, and in a mesh layers get those of the first replica. :func:`mlpint.parallelize` does it once. Where
    replicas can drift (see there), do it every so many steps; the optimiser's moments are not touched, so that the
    cause of a drift goes on acting in between.
    """
    comm = comm_of(model, comm)
    outside = tensors_outside(model)
    comm.world.vote({"parameters and buffers outside the stack": describe(outside)}, "the model")
    for tensor in outside.values():
        if tensor.numel():
            comm.world.broadcast(tensor, 0)
    for tensor in _of_layers(model).values() if comm.data.size > 1 else ():
        if tensor.numel():
            comm.data.broadcast(tensor, 0)
    for _, parameter, (stack, ranks) in _shared(model).values():
        _send_from_first(stack.comm, parameter, ranks)
    _share_random_state(comm)  # replicas of a mesh keep their own: they drop out other units


def tensors_outside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers outside the LayerParallel stacks, each once, by name."""
    inside = {m for _, stack in stacks_of(model) for m in stack.modules()}
    names: dict[torch.Tensor, str] = {}
    for prefix, module in model.named_modules():
        if module not in inside:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                names.setdefault(tensor, f"{prefix}.{name}" if prefix else name)
    return {name: tensor for tensor, name in names.items()}


def _of_layers(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's parameters and buffers of layers, each once, by name."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, stack in stacks_of(model)
        for name, tensor in (*stack.named_parameters(), *stack.named_buffers())
    }


def describe(tensors: Mapping[Any, torch.Tensor]) -> str:
    """A short text that is equal only where names, shapes and dtypes are."""
    text = "\n".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items())
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{len(tensors)} of {sum(t.numel() for t in tensors.values())} elements, digest {digest}"


def comm_of(model: nn.Module, comm: Any) -> Comm:
    if comm is None:
        for _, stack in stacks_of(model):
            return stack.comm
    return Comm.of(comm)


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=16).hexdigest()


def _shared(model: nn.Module) -> dict[str, tuple[str, nn.Parameter, tuple[LayerParallel, list[int]]]]:
    """Own parameters that layers of other ranks use too, under a key that those ranks give them too."""
    shared = {}
    for path, stack in stacks_of(model):
        names = {p: f"{path}.{name}" if path else name for name, p in reversed([*stack.named_parameters()])}
        count: dict[str, int] = {}
        for parameter, ranks in stack.shared_parameters:
            group = f"{path} {ranks}"
            count[group] = count.get(group, 0) + 1
            shared[f"{group} {count[group]}"] = names[parameter], parameter, (stack, ranks)
    return shared


def _send_from_first(comm: Comm, tensor: torch.Tensor, ranks: list[int]) -> None:
    """Overwrites a tensor, on the given ranks, with that of the first of them."""
    transport = comm.transport
    state = State([tensor.detach().contiguous()])
    if comm.rank == ranks[0]:
        for other in ranks[1:]:
            transport.post(other, _TAG, state)
        transport.flush()
    else:
        arrived = state.empty_like()
        transport.receive(ranks[0], _TAG, arrived).wait(transport.stall_limit)
        with torch.no_grad():
            tensor.copy_(arrived.tensors[0])


def _share_random_state(comm: Comm) -> None:
    torch.set_rng_state(comm.broadcast(torch.get_rng_state(), 0))
    if comm.device.type == "cuda":
        torch.cuda.set_rng_state(comm.broadcast(torch.cuda.get_rng_state(comm.device), 0), comm.device)
