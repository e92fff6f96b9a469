"""What other libraries do with the whole of a model whose layers are spread over ranks: DDP, PEFT."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_kinds: list[type[nn.Module]] = []


def keep_layers_out_of_ddp(kind: type[nn.Module]) -> None:
    """From now on DistributedDataParallel leaves alone the layers of stacks that are spread over its ranks.

    It would broadcast rank 0's layers over those of the others, which have as many parameters of the same shapes, and
    average gradients of different layers. Where its ranks hold the same layers (one process group for each part of the
    depth) it is right as it is. The hook sees the model being put into its wrapper.

    Args:
        kind: the class of the stacks.
    """
    if not _kinds and torch.distributed.is_available():
        _kinds.append(kind)
        register_module_module_registration_hook(_see)


def _see(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    if name != "module" or module is None or "torch.nn.parallel.distributed" not in sys.modules:
        return
    if not isinstance(owner, nn.parallel.DistributedDataParallel):
        return
    apart: set[str] = set()
    stacks: list[tuple[str, Any]] = [(path, m) for path, m in module.named_modules() if isinstance(m, _kinds[0])]
    for path, stack in stacks:
        if stack.comm.size == 1:
            continue
        held: list[list[int] | None] = [None] * torch.distributed.get_world_size(owner.process_group)
        torch.distributed.all_gather_object(
            held, [*stack.layout.local_indices(stack.comm.rank)], group=owner.process_group
        )
        if any(indices != held[0] for indices in held):
            entries = [name for name, _ in (*stack.named_parameters(), *stack.named_buffers())]
            apart.update(f"{path}.{entry}" if path else entry for entry in entries)
    if apart:
        owner.parameters_to_ignore |= apart
        owner._module_parameters = [p for n, p in module.named_parameters() if n not in owner.parameters_to_ignore]
        if not owner._module_parameters:
            raise ValueError(
                "DistributedDataParallel has nothing to do for a model that is all LayerParallel stack: its ranks hold "
                "different layers. Use the model without it"
            )


def refuse_peft() -> None:
    """Refuses a state dict to PEFT, which would look there for the adapters of this rank's layers alone.

    Raises:
        RuntimeError: PEFT's ``save_pretrained`` is among the callers.
    """
    if "peft" not in sys.modules:
        return
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "get_peft_model_state_dict":
            raise RuntimeError(
                "PEFT's save_pretrained and get_peft_model_state_dict keep the adapters of this rank's layers alone: "
                "call mlpint.hf.save_pretrained(model, directory) on every rank"
            )
