"""Says where the Triton kernels stand in for an operation."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from ..kernels import dispatch

_MODULES = {"ln_backward_add": "ln_backward"}  # operations whose file has another name


def kernel(op: str, d: int, m: int, j: int, x: torch.Tensor, *others: torch.Tensor) -> ModuleType | None:
    """The module with the kernel of an operation; None where plain PyTorch is to be taken.

    Args:
        d, m, j: width, rows of one layer and layers, as :func:`mlpint.kernels.dispatch.choose` has them.
        x: the operand.
        others: tensors that the kernel takes only in x's dtype; under autocast they differ.
    """
    if x.device.type == "cpu" and not dispatch.is_forced():  # kernels run there only where a test says so
        return None
    choice = dispatch.choose(op, d=d, m=m, j=j, dtype=x.dtype, device=x.device)
    if choice.path != "triton" or any(t.dtype != x.dtype for t in others):
        return None
    return importlib.import_module(f"..kernels.{_MODULES.get(op, op)}", __package__)


def dropout_kernels(device: torch.device) -> ModuleType | None:
    """The module of dropout's kernels, which make all masks on a device or none: a mask is one function of its key."""
    return importlib.import_module("..kernels.dropout", __package__) if dispatch.usable("dropout", device) else None


def recorded(*tensors: torch.Tensor) -> bool:
    """Whether autograd follows, which cannot look into kernels."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
