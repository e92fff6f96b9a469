"""Saving and loading models and optimisers, wrapped or not, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..comm.collectively import collectively
from ..comm.communicator import Comm
from ..errors import CheckpointError, UserError
from ..nn.row_names import RowPart
from ..nn.stack import named_rows
from ..parallel.clip import stacks_of
from . import directory as files
from .manifest import Checkpoint, describe, open_checkpoint, write_manifest


def save(
    directory: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    info: Mapping[str, Any] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    keep: int = 0,
    comm: Comm | None = None,
) -> Path:
    """Writes ``directory/step-...`` and then points ``latest`` to it. Collective; the directory is shared by all ranks.

    Each tensor is written once, by the lowest rank that holds it. Until the last file is on disk the checkpoint does
    not exist, and ``latest`` stays at the one before. Of a step that is saved again the older checkpoint is deleted
    once ``latest`` names the newer one. No other process may be saving there.

    Args:
        directory: made if it does not exist.
        step: optimiser steps done.
        model: its parameters and buffers are saved; ``LayerParallel`` stacks by the names of the unwrapped layers.
        optimizer: the state that it keeps for each parameter is saved; hyperparameters are not.
        info: anything JSON can hold.
        extra: more tensors, for :meth:`Checkpoint.extra`; what several ranks have under one name is the same on all.
        keep: of the checkpoints up to this step so many are kept, this one included; 0: all.

    Returns:
        The checkpoint's path: ``step-`` and the step, with ``.2`` or more behind it if it was taken.

    Raises:
        UserError: on all ranks, if a file cannot be written on any.
    """
    comm = Comm.of(comm).world
    directory = Path(directory)
    tensors = {**model_tensors(model), **_optimizer_tensors(model, optimizer), **_learnt_tensors(model)}
    tensors |= {name: tensors[name] - part.piece.less for name, part in _kept_less(model)}
    tensors |= {f"extra.{name}": tensor.detach() for name, tensor in (extra or {}).items()}

    def begin() -> list[str]:
        return [path.name for path in files.begin(directory, step)] if comm.rank == 0 else []

    def write() -> dict[str, Any]:
        own = {name: tensor for name, tensor in tensors.items() if owners[name] == comm.rank}
        return _write(partial / f"rank-{comm.rank:05d}.safetensors", own) if own else {}

    def commit() -> None:
        if comm.rank == 0:
            tensor_files = {name: f"rank-{owner:05d}.safetensors" for name, owner in owners.items()}
            listed = {f"rank-{r:05d}.safetensors": entry for r, entry in enumerate(entries) if entry}
            write_manifest(partial, Checkpoint(final, step, dict(info or {}), tensor_files, listed))
            files.publish(partial, final)
            files.delete_leftovers(directory)
            if keep:
                files.delete_all_but(keep, final)

    try:
        final, partial = (directory / name for name in collectively(comm, begin)[0])
        owners: dict[str, int] = {}
        for rank, names in enumerate(collectively(comm, lambda: list(tensors))):
            for name in names:
                owners.setdefault(name, rank)
        entries = collectively(comm, write)
        collectively(comm, commit)
    except UserError:
        if comm.rank == 0:
            with suppress(OSError):
                files.delete_leftovers(directory)
        raise
    return final


def load(
    checkpoint: Checkpoint | str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    comm: Comm | None = None,
) -> Checkpoint:
    """Fills a model, wrapped or not, and an optimiser's state; each rank reads what it holds. Collective.

    Nothing is changed on any rank unless everything could be read on all of them.

    Raises:
        CheckpointError: on all ranks; a missing or damaged file by name, a tensor that is missing or of another shape.
    """
    comm = Comm.of(comm).world
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    targets = model_tensors(model)
    values: dict[str, torch.Tensor] = {}

    def read() -> None:
        wanted = list(targets)
        if optimizer is not None:
            own = {f"optimizer.{name}" for name, _, _ in named_rows(model)}
            wanted += [name for name in checkpoint.tensors if name.rpartition(".")[0] in own]
        wanted += [name for name in checkpoint.tensors if name.startswith("learnt.")]
        values.update(checkpoint.read(wanted))
        check_shapes(checkpoint, values, targets)

    collectively(comm, read)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values.pop(name))
        for name, part in _kept_less(model):
            targets[name].add_(part.piece.less)
    learnt = {name: values.pop(name).to(comm.device) for name in [*values] if name.startswith("learnt.")}
    for name, stack in stacks_of(model):
        prefix = f"learnt.{name}."
        stack.load_learnt_tensors({n.removeprefix(prefix): t for n, t in learnt.items() if n.startswith(prefix)})
    if optimizer is not None:
        _restore_optimizer(model, optimizer, values)
    return checkpoint


def check_shapes(
    checkpoint: Checkpoint, values: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], hint: str = ""
) -> None:
    """Raises a CheckpointError, with ``hint`` at its end, where a value read has not the shape of its target."""
    for name, target in targets.items():
        if name in values and values[name].shape != target.shape:
            shapes = f"{list(values[name].shape)} in the checkpoint, {list(target.shape)} in the model"
            raise CheckpointError(f"{checkpoint.path}: {name} is {shapes}{hint}")


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What this rank holds. Not ``state_dict()``, which brings all layers to every rank."""
    parameters = {f"model.{name}": _part(p.detach(), part) for name, p, part in named_rows(model)}
    return parameters | {f"model.{name}": buffer.detach() for name, buffer in _saved_buffers(model)}


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that a state dict has, too; others follow from the model itself."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".removeprefix("."), buffer


def _learnt_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the stacks' coarse operators have learnt; it belongs to the solver and not to the model."""
    return {f"learnt.{name}.{key}": t for name, stack in stacks_of(model) for key, t in stack.learnt_tensors().items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    return {
        f"optimizer.{name}.{key}": _part(value, part) if value.shape == parameter.shape else value.clone()
        for name, parameter, part in named_rows(model)
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items()
        if isinstance(value, torch.Tensor)
    }


def _part(tensor: torch.Tensor, part: RowPart | None) -> torch.Tensor:
    return tensor if part is None else part(tensor)


def _kept_less(model: nn.Module) -> list[tuple[str, RowPart]]:
    """Those that the layers themselves keep as what they differ from a number by, as checkpoints do."""
    return [(f"model.{name}", part) for name, _, part in named_rows(model) if part is not None and part.piece.less]


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, torch.Tensor]) -> None:
    optimizer.state.clear()
    parameters = {name: (parameter, part) for name, parameter, part in named_rows(model)}
    for name, value in values.items():
        parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
        parameter, part = parameters[parameter_name]
        state = optimizer.state[parameter]
        # AdamW counts its steps in host memory; what has the parameter's shape lives beside the parameter.
        if value.dim() == 0 or value.shape != _part(parameter, part).shape:
            state[key] = value
        elif part is None:
            state[key] = value.to(parameter.device)
        else:
            part(state.setdefault(key, torch.empty_like(parameter, dtype=value.dtype))).copy_(value)


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    # A tensor that is a view of something larger would bring all of it along.
    contiguous = {
        name: t.cpu().contiguous() if t.untyped_storage().nbytes() == t.nbytes else t.cpu().contiguous().clone()
        for name, t in tensors.items()
    }
    try:
        save_file(contiguous, path)
    except SafetensorError as error:  # a full disk among others
        raise UserError(f"{path}: cannot be written ({error})") from None
    files.sync(path)
    return describe(path)
