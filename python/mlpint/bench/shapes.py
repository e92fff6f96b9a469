"""The shapes that are timed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError

MASKS = ("causal", "full", "padded")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """J independent layers on batches of their own.

    Attributes:
        d: width in channels; heads are 64 wide, or all of d where it is narrower.
        batch, sequence: of one layer's input; M = batch x sequence rows.
        j: layers, those of so many intervals.
        mask: ``"causal"``, ``"full"`` or ``"padded"`` (full, with key lengths from half the sequence on).
        dtype: of activations and parameters.
    """

    d: int
    batch: int
    sequence: int
    j: int = 1
    mask: str = "causal"
    dtype: torch.dtype = torch.float32

    @property
    def m(self) -> int:
        return self.batch * self.sequence

    @property
    def heads(self) -> int:
        return max(1, self.d // 64)

    @property
    def ffn(self) -> int:
        return 4 * self.d

    def extra(self) -> dict[str, object]:
        """The columns of a row of results that tell the shape, beside d."""
        return {
            "batch": self.batch,
            "sequence": self.sequence,
            "M": self.m,
            "J": self.j,
            "mask": self.mask,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"d {self.d}, M {self.batch} x {self.sequence}, J {self.j}, {self.mask}, {dtype}"


@dataclass(frozen=True)
class Grid:
    """The shapes that are all combinations of these values."""

    d: Sequence[int]
    m: Sequence[int]
    j: Sequence[int]
    masks: Sequence[str]
    dtypes: Sequence[str]
    sequence: int

    def __post_init__(self) -> None:
        for name in ("d", "m", "j"):
            for value in getattr(self, name):
                if value < 1:
                    raise UserError(f"{name} = {value}: must be an integer of at least 1")
        for value in self.d:
            if value % max(1, value // 64):
                raise UserError(f"d = {value}: must be a multiple of 64, or less than 128")
        for name, allowed in (("masks", MASKS), ("dtypes", tuple(DTYPES))):
            for value in getattr(self, name):
                if value not in allowed:
                    raise UserError(f"{name} has {value!r}: must be of {', '.join(allowed)}")
        for value in self.m:
            if value % min(value, self.sequence):
                raise UserError(f"m = {value}: must be a multiple of the sequence, {self.sequence}, or less than it")

    def shapes(self, masked: bool = True) -> Iterator[Shape]:
        """All shapes; without ``masked`` the mask does not matter, and the first one stands for all."""
        masks = self.masks if masked else self.masks[:1]
        for dtype, d, m, j, mask in itertools.product(self.dtypes, self.d, self.m, self.j, masks):
            sequence = min(m, self.sequence)
            yield Shape(d, m // sequence, sequence, j, mask, DTYPES[dtype])


# J layers of M rows, up to what one GPU holds at d 4096; a layer-parallel step has small M and large J.
CUDA_QUICK = Grid((256, 1024), (256, 8192), (1, 16), ("causal",), ("bfloat16",), 256)
CUDA_FULL = Grid((128, 256, 512, 1024, 2048, 4096), (256, 1024, 8192), (1, 4, 16), MASKS, ("float32", "bfloat16"), 256)
CPU_QUICK = Grid((64,), (64,), (1, 4), ("causal", "padded"), ("float32",), 32)
CPU_FULL = Grid((64, 128, 256), (32, 256), (1, 8), MASKS, ("float32", "bfloat16"), 32)
