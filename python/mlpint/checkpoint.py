"""Checkpoints that any number of ranks can load, that are whole or absent, and that show damage by name.

A checkpoint is a directory ``step-00000100`` with one safetensors file for each rank that wrote it and a
``manifest.json``, which says which file holds which tensor and has the SHA-256 of every file and of itself. Tensors go
by the names they have in the unwrapped model, so nothing depends on the number of ranks. Beside it, ``latest`` names
the newest checkpoint. Nothing in a checkpoint is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .comm.collectively import collectively
from .comm.communicator import Comm
from .errors import CheckpointError, UserError
from .nn.stack import named_rows
from .parallel.clip import stacks_of

FORMAT = 1
_NAME = re.compile(r"step-\d{8}")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a manifest says; its own checksum has been verified.

    Attributes:
        path: of the checkpoint's directory.
        step: optimiser steps done.
        info: what :func:`save` was given besides tensors.
        tensors: tensor name -> name of the file that holds it.
        files: file name -> ``{"bytes": ..., "sha256": ...}``.
    """

    path: Path
    step: int
    info: Mapping[str, Any]
    tensors: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, in host memory. Only the files that hold them are read; each is verified first.

        Raises:
            CheckpointError: a name that is not in the checkpoint; a file that is missing, cut off or changed.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise CheckpointError(f"{self.path}: holds no tensor {name}")
            by_file.setdefault(self.tensors[name], []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            self._verify(file)
            with safe_open(self.path / file, framework="pt") as file_content:
                tensors.update({name: file_content.get_tensor(name) for name in wanted})
        return tensors

    def extra(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
        """What :func:`save` was given as ``extra``, of the names that are wanted; see :meth:`read`."""
        names = (name.removeprefix("extra.") for name in self.tensors if name.startswith("extra."))
        tensors = self.read([f"extra.{name}" for name in names if wanted(name)])
        return {name.removeprefix("extra."): tensor for name, tensor in tensors.items()}

    def _verify(self, file: str) -> None:
        path, expected = self.path / file, self.files[file]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"{path}: is damaged ({size} bytes instead of {expected['bytes']})")
            if _sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{path}: is damaged (its checksum differs from the manifest's)")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at a path: a checkpoint directory, or one with ``latest`` in it or in its ``checkpoints``.

    Raises:
        CheckpointError: there is none, or its manifest is damaged; names the file.
    """
    path = Path(path)
    for place in (path, path / "checkpoints"):
        if not (place / "manifest.json").exists() and (place / "latest").exists():
            name = _read(place / "latest").decode("utf-8", errors="replace").strip()
            if not _NAME.fullmatch(name):
                raise CheckpointError(f"{place / 'latest'}: is damaged (it names no checkpoint)")
            path = place / name
            break
    manifest = path / "manifest.json"
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such run or checkpoint directory")
    try:
        envelope = json.loads(_read(manifest))
        content = envelope["content"]
        intact = hashlib.sha256(_canonical(content)).hexdigest() == envelope["sha256"]
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{manifest}: is damaged (it does not match its own checksum)")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{manifest}: has format {content['format']}, this version of mlpint reads {FORMAT}")
    return Checkpoint(path, content["step"], content["info"], content["tensors"], content["files"])


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
    not exist, and ``latest`` stays at the one before.

    Args:
        directory: made if it does not exist.
        step: optimiser steps done.
        model: its parameters and buffers are saved; ``LayerParallel`` stacks by the names of the unwrapped layers.
        optimizer: the state that it keeps for each parameter is saved; hyperparameters are not.
        info: anything JSON can hold.
        extra: more tensors, for :meth:`Checkpoint.extra`; what several ranks have under one name is the same on all.
        keep: of the checkpoints up to this step so many are kept, this one included; 0: all.

    Returns:
        The checkpoint's path.

    Raises:
        UserError: on all ranks, if a file cannot be written on any.
    """
    comm = Comm.of(comm)
    directory = Path(directory)
    final, partial = directory / f"step-{step:08d}", directory / f".step-{step:08d}.partial"
    tensors = {**model_tensors(model), **_optimizer_tensors(model, optimizer), **_learnt_tensors(model)}
    tensors |= {f"extra.{name}": tensor.detach() for name, tensor in (extra or {}).items()}

    def make() -> None:
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> dict[str, Any]:
        own = {name: tensor for name, tensor in tensors.items() if owners[name] == comm.rank}
        return _write(partial / f"rank-{comm.rank:05d}.safetensors", own) if own else {}

    def commit() -> None:
        if comm.rank == 0:
            files = {name: f"rank-{owner:05d}.safetensors" for name, owner in owners.items()}
            listed = {f"rank-{r:05d}.safetensors": entry for r, entry in enumerate(entries) if entry}
            _commit(partial, final, Checkpoint(final, step, dict(info or {}), files, listed))
            if keep:
                _delete_all_but(keep, final)

    try:
        collectively(comm, make)
        owners: dict[str, int] = {}
        for rank, names in enumerate(collectively(comm, lambda: list(tensors))):
            for name in names:
                owners.setdefault(name, rank)
        entries = collectively(comm, write)
        collectively(comm, commit)
    except UserError:
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
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
    comm = Comm.of(comm)
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
    parameters = {f"model.{name}": _row(p.detach(), row) for name, p, row in named_rows(model)}
    return parameters | {f"model.{name}": tensor.detach() for name, tensor in model.named_buffers()}


def _learnt_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the stacks' coarse operators have learnt; it belongs to the solver and not to the model."""
    return {f"learnt.{name}.{key}": t for name, stack in stacks_of(model) for key, t in stack.learnt_tensors().items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    return {
        f"optimizer.{name}.{key}": _row(value, row) if value.shape == parameter.shape else value.clone()
        for name, parameter, row in named_rows(model)
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items()
        if isinstance(value, torch.Tensor)
    }


def _row(tensor: torch.Tensor, row: int | None) -> torch.Tensor:
    return tensor if row is None else tensor[row]


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, torch.Tensor]) -> None:
    optimizer.state.clear()
    parameters = {name: (parameter, row) for name, parameter, row in named_rows(model)}
    for name, value in values.items():
        parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
        parameter, row = parameters[parameter_name]
        state = optimizer.state[parameter]
        # AdamW counts its steps in host memory; what has the parameter's shape lives beside the parameter.
        if value.dim() == 0 or value.shape != _row(parameter, row).shape:
            state[key] = value
        elif row is None:
            state[key] = value.to(parameter.device)
        else:
            state.setdefault(key, torch.empty_like(parameter, dtype=value.dtype))[row].copy_(value)


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    # A tensor that is a view of something larger would bring all of it along.
    contiguous = {
        name: t.cpu().contiguous() if t.untyped_storage().nbytes() == t.nbytes else t.cpu().contiguous().clone()
        for name, t in tensors.items()
    }
    save_file(contiguous, path)
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _commit(partial: Path, final: Path, checkpoint: Checkpoint) -> None:
    for file, entry in checkpoint.files.items():
        if not (partial / file).exists() or (partial / file).stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{partial / file}: is not visible on rank 0; all ranks must write to one file system"
            )
    content = {
        "format": FORMAT,
        "step": checkpoint.step,
        "info": checkpoint.info,
        "tensors": checkpoint.tensors,
        "files": checkpoint.files,
    }
    envelope = {"sha256": hashlib.sha256(_canonical(content)).hexdigest(), "content": content}
    _write_text(partial / "manifest.json", json.dumps(envelope, indent=1))
    _sync(partial)
    directory, replaced = final.parent, final.parent / f".{final.name}.replaced"
    if final.exists():  # a run that was resumed before this step comes by again
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    _write_text(directory / ".latest.partial", final.name + "\n")
    (directory / ".latest.partial").rename(directory / "latest")
    _sync(directory)


def _delete_all_but(keep: int, newest: Path) -> None:
    """Checkpoints of later steps, which a run that was resumed earlier has yet to come by again, stay."""
    checkpoints = sorted(p for p in newest.parent.iterdir() if _NAME.fullmatch(p.name) and p.name <= newest.name)
    for path in checkpoints[:-keep]:
        deleted = path.with_name(f".{path.name}.deleted")
        path.rename(deleted)  # never half a checkpoint under its name
        shutil.rmtree(deleted, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
