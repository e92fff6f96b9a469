"""What a checkpoint consists of: its manifest and the tensors that it lists, each verified before it is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import CheckpointError
from . import directory

FORMAT = 1


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

    ``step-00000100`` is that step's directory also where it has another name, since the step was saved again.

    Raises:
        CheckpointError: there is none, or its manifest is damaged; names the file.
    """
    path = Path(path)
    for place in (path, path / "checkpoints"):
        if not (place / "manifest.json").exists() and (place / "latest").exists():
            name = _read(place / "latest").decode("utf-8", errors="replace").strip()
            if not directory.is_name(name):
                raise CheckpointError(f"{place / 'latest'}: is damaged (it names no checkpoint)")
            path = place / name
            break
    path = directory.find(path)
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


def describe(path: Path) -> dict[str, Any]:
    """What the manifest says of a file beside it, and :meth:`Checkpoint.read` verifies."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def write_manifest(place: Path, checkpoint: Checkpoint) -> None:
    """Writes the manifest of a checkpoint whose files lie in ``place``.

    Raises:
        CheckpointError: a file is not there, since another rank has written it elsewhere.
    """
    for name, entry in checkpoint.files.items():
        if not (place / name).exists() or (place / name).stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{place / name}: is not visible on rank 0; all ranks must write to one file system")
    content = {
        "format": FORMAT,
        "step": checkpoint.step,
        "info": checkpoint.info,
        "tensors": checkpoint.tensors,
        "files": checkpoint.files,
    }
    envelope = {"sha256": hashlib.sha256(_canonical(content)).hexdigest(), "content": content}
    directory.write_text(place / "manifest.json", json.dumps(envelope, indent=1))


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
