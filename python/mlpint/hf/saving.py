"""``save_pretrained`` of models whose layers are spread over ranks, adapters of PEFT included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..comm.collectively import collectively
from ..comm.communicator import Comm
from ..errors import UserError
from ..parallel.clip import stacks_of
from ..parallel.shared_parameters import gather_tensors

ADAPTERS = "adapter_model.safetensors"


def ranks_of(model: nn.Module) -> Comm | None:
    """The ranks that a model's layers are spread over; None where they are all here."""
    comms = [stack.comm for _, stack in stacks_of(model) if stack.comm.size > 1]
    return comms[0] if comms else None


def save_pretrained(model: Any, directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """``model.save_pretrained(directory, ...)`` with all layers, written once. Collective: every rank calls it.

    Args:
        model: a transformers or PEFT model, its layers spread over ranks or not.
        directory: made if it does not exist; rank 0 writes it.
        **kwargs: passed on.

    Raises:
        UserError: on all ranks, where rank 0 could not write.
    """
    comm = ranks_of(model)
    if comm is None:
        model.save_pretrained(directory, **kwargs)
        return
    state = model.state_dict()
    adapters = _adapters(model, state, comm)

    def write() -> None:
        if comm.rank != 0:
            return
        model.save_pretrained(directory, state_dict=state, **kwargs)
        if adapters is None:
            return
        path = Path(directory, ADAPTERS)
        if not path.exists():
            raise UserError(f"{directory}: PEFT wrote no {ADAPTERS}; save with safe_serialization=True")
        # PEFT goes by the modules that are here; those of other ranks have adapters too.
        save_file({**adapters, **load_file(path)}, path, metadata={"format": "pt"})

    collectively(comm, write)


def _adapters(model: Any, state: dict[str, torch.Tensor], comm: Comm) -> dict[str, torch.Tensor] | None:
    """The adapters of all ranks, on all; None if the model has none."""
    if not hasattr(model, "peft_config"):
        return None
    from peft import get_peft_model_state_dict

    if len(model.peft_config) > 1:
        raise UserError(f"a model with {len(model.peft_config)} adapters is saved on one process, after gathering it")
    own = {name: t.detach().contiguous() for name, t in get_peft_model_state_dict(model, state_dict=state).items()}
    return {name: t.cpu() for name, t in gather_tensors(own, comm).items()}
