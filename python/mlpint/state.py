"""States: what a layer maps to the next. One tensor or a tuple of tensors, held as a tuple."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class State:
    """Tensors that move through the solver together.

    ``buffers()`` is what a transport asks for: contiguous memory as (pointer, bytes, device index or -1 for the host).
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.tensors = tuple(tensors)

    def buffers(self) -> list[tuple[int, int, int]]:
        self.tensors = tuple(t.contiguous() for t in self.tensors)
        return [(t.data_ptr(), t.nbytes, t.get_device()) for t in self.tensors]

    def empty_like(self) -> State:
        """Contiguous memory of the same shapes, dtypes and devices, to receive into."""
        return State(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in self.tensors)


def describe(tensors: Iterable[torch.Tensor]) -> str:
    """Shapes, dtypes and kinds of device, e.g. ``8x64x128 float32 cpu``; for comparison across ranks."""
    return ", ".join(
        f"{'x'.join(map(str, t.shape)) or 'scalar'} {str(t.dtype).removeprefix('torch.')} {t.device.type}"
        for t in tensors
    )


def version(tensor: torch.Tensor) -> int:
    """How often a tensor has been changed in place, as far as torch counts it: not in inference mode."""
    return -1 if tensor.is_inference() else tensor._version
