"""The whole of a model for others to load: in rank 0's host memory, or as a torch.distributed.checkpoint."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..comm.collectively import collectively
from ..comm.communicator import Comm
from ..errors import UserError
from ..parallel.clip import stacks_of
from ..parallel.shared_parameters import on_first_rank


def gather(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the whole model in rank 0's host memory, empty on all other ranks. Collective.

    ``model.state_dict()`` has it on every rank, where each needs the memory for it. Of several replicas in a mesh each
    has one.
    """
    with on_first_rank():
        state = model.state_dict()
    if any(stack.comm.rank for _, stack in stacks_of(model)):
        return {}
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def export(model: nn.Module, directory: str | os.PathLike[str], *, comm: Any = None) -> None:
    """Writes the model's parameters and buffers as a ``torch.distributed.checkpoint``. Collective.

    Under the names of the unwrapped model, so that ``torch.distributed.checkpoint.load(model.state_dict(),
    checkpoint_id=directory)`` fills it, sharded in whatever way. Rank 0 takes the whole model into host memory and
    writes it.

    Raises:
        UserError: on all ranks, where rank 0 could not write.
    """
    world = Comm.of(comm).world
    state: dict[str, Any] = gather(model)

    def write() -> None:
        if world.rank == 0:
            import torch.distributed.checkpoint as dcp

            try:
                dcp.save(state, checkpoint_id=os.fspath(directory), no_dist=True)
            except dcp.api.CheckpointException as error:
                causes = "; ".join(str(failure[0]) for failure in error.failures.values())
                raise UserError(f"{os.fspath(directory)}: cannot be written ({causes})") from None

    collectively(world, write)
