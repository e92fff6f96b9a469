"""Checkpoints that any number of ranks can load, that are whole or absent, and that show damage by name.

A checkpoint is a directory ``step-00000100`` with one safetensors file for each rank that wrote it and a
``manifest.json``, which says which file holds which tensor and has the SHA-256 of every file and of itself. Tensors go
by the names they have in the unwrapped model, so nothing depends on the number of ranks. Beside it, ``latest`` names
the newest checkpoint. Nothing in a checkpoint is ever unpickled.
"""

from .export import export, gather
from .manifest import Checkpoint, open_checkpoint
from .state import check_shapes, load, model_tensors, save

__all__ = ["Checkpoint", "check_shapes", "export", "gather", "load", "model_tensors", "open_checkpoint", "save"]
