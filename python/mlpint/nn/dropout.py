"""Dropout masks that are a function of a key and a place alone.

The mask at a place of a layer is drawn by a generator of torch's (on a CPU the Mersenne Twister, on a GPU Philox)
that is seeded with the key and the place. Nobody's generator moves on, so that a layer can be evaluated anywhere, any
number of times, alone or with others in one call, and its backward makes the mask again instead of keeping it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import random_keys

# Places in a block: attention weights and the outputs of both halves; weights and output of cross-attention.
ATTENTION, PROJECTION, FFN, CROSS_ATTENTION, CROSS_PROJECTION = range(5)


_LEVELS = 1 << 16  # a draw is one of so many: probabilities count in parts of that


def keep_mask(
    keys: Sequence[int], place: int, shape: Sequence[int], probability: float, device: torch.device
) -> torch.Tensor:
    """The mask [J, *shape], one row for each key: True where an element is kept."""
    size = math.prod(shape)
    # Four draws of 16 bits at once, which is half the work of one of 32.
    bits = torch.empty(len(keys), -(-size // 4), dtype=torch.int64, device=device)
    generator = torch.Generator(device)
    for row, key in zip(bits, keys, strict=True):
        row.random_(-(2**63), None, generator=generator.manual_seed(random_keys.key(key, place, 0, 0)))
    draws = bits.view(torch.int16)[:, :size]
    return (draws >= _dropped_levels(probability) - _LEVELS // 2).view(len(keys), *shape)


def scaled_mask(
    keys: Sequence[int], place: int, shape: Sequence[int], probability: float, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """What to multiply by, [J, *shape]: 0 where an element is dropped, and elsewhere what keeps the mean."""
    mask = keep_mask(keys, place, shape, probability, device)
    return mask.to(dtype).mul_(_LEVELS / (_LEVELS - _dropped_levels(probability)))


def _dropped_levels(probability: float) -> int:
    return min(round(probability * _LEVELS), _LEVELS - 1)


def dropped(x: torch.Tensor, keys: Sequence[int] | None, place: int, probability: float) -> torch.Tensor:
    """Returns x [J, ...] behind dropout; x itself without keys. The map is linear and its own adjoint."""
    if keys is None or probability == 0:
        return x
    return x * scaled_mask(keys, place, x.shape[1:], probability, x.device, x.dtype)
