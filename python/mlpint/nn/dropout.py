"""Dropout masks that are a function of a key and a place alone.

On a GPU with Triton they are made by Philox inside kernels (mlpint.kernels.dropout). Elsewhere the mask at a place of a
layer is drawn by a generator of torch's that is seeded with the key and the place. Nobody's generator moves on, so that
a layer can be evaluated anywhere, any number of times, alone or with others in one call, and its backward makes the
mask again instead of keeping it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch

from ..kernels.draws import LEVELS, factor_of, levels_of
from . import ops, random_keys
from .kernels import dropout_kernels, recorded

# Places in a block: attention weights and the outputs of both halves; weights and output of cross-attention.
ATTENTION, PROJECTION, FFN, CROSS_ATTENTION, CROSS_PROJECTION = range(5)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """The dropout of J layers at one place of theirs.

    Attributes:
        keys: one for each layer.
        place: which of a block's.
        probability: that an element is dropped; counts in parts of 1 / 65536.
    """

    keys: tuple[int, ...]
    place: int
    probability: float

    @property
    def levels(self) -> int:
        """Those of 65536 draws that drop an element."""
        return levels_of(self.probability)

    def seeds(self, device: torch.device) -> torch.Tensor:
        """The keys as kernels take them, int64 [J]."""
        return _seeds(self.keys, device)

    def factors(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What to multiply by, [J, *shape]: 0 where an element is dropped, and elsewhere what keeps the mean."""
        module = dropout_kernels(device)
        if module:
            rows, columns = math.prod(shape[:-1]), shape[-1]
            factors = module.dropout_mask(self.seeds(device), self.place, rows, columns, self.levels, dtype)
            return factors.view(len(self.keys), *shape)
        return self._kept(shape, device).to(dtype).mul_(factor_of(self.levels))

    def _kept(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Where elements are kept, bool [J, *shape]."""
        size = math.prod(shape)
        # Four draws of 16 bits at once, which is half the work of one of 32.
        bits = torch.empty(len(self.keys), -(-size // 4), dtype=torch.int64, device=device)
        generator = torch.Generator(device)
        for row, key in zip(bits, self.keys, strict=True):
            row.random_(-(2**63), None, generator=generator.manual_seed(random_keys.key(key, self.place, 0, 0)))
        draws = bits.view(torch.int16)[:, :size]
        return (draws >= self.levels - LEVELS // 2).view(len(self.keys), *shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x [J, ...] behind dropout. The map is linear and its own adjoint. Differentiable."""
        module = dropout_kernels(x.device)
        if module and not recorded(x):
            flat = module.drop(x.flatten(1, -2), self.seeds(x.device), self.place, self.levels)
            return flat.view(x.shape)
        return x * self.factors(x.shape[1:], x.dtype, x.device)

    def step(self, update: torch.Tensor, y: torch.Tensor, x: torch.Tensor, h: float) -> torch.Tensor:
        """Returns x + h ((y - x) + drop(update)), all [J, M, D]; the update's memory may be used up."""
        module = dropout_kernels(x.device)
        if module and not recorded(update, y, x):
            return module.drop_step(update, y, x, self.seeds(x.device), self.place, self.levels, h)
        return ops.residual_add(self(update), y, x, h)


@functools.lru_cache(maxsize=256)
def _seeds(keys: tuple[int, ...], device: torch.device) -> torch.Tensor:
    signed = torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys], device="cpu")
    # From pinned memory, which a GPU is not waited for.
    return signed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else signed
