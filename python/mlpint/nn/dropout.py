"""Dropout masks that are a function of a key and a place alone.

The mask at a place of a layer is drawn by a generator of torch's (on a CPU the Mersenne Twister, on a GPU Philox)
that is seeded with the key and the place. Nobody's generator moves on, so that a layer can be evaluated anywhere, any
number of times, alone or with others in one call, and its backward makes the mask again instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import random_keys

# Places in a block: attention weights and the outputs of both halves; weights and output of cross-attention.
ATTENTION, PROJECTION, FFN, CROSS_ATTENTION, CROSS_PROJECTION = range(5)


def keep_mask(
    keys: Sequence[int], place: int, shape: Sequence[int], probability: float, device: torch.device
) -> torch.Tensor:
    """The mask [J, *shape], one row for each key: True where an element is kept."""
    draws = torch.empty(len(keys), *shape, dtype=torch.int32, device=device)
    generator = torch.Generator(device)
    for row, key in zip(draws, keys, strict=True):
        row.random_(generator=generator.manual_seed(random_keys.key(key, place, 0, 0)))  # from 0 to 2^31 - 1
    return draws >= round(probability * 2.0**31)


def dropped(x: torch.Tensor, keys: Sequence[int] | None, place: int, probability: float) -> torch.Tensor:
    """Returns x [J, ...] with dropped elements zero and the others scaled up; x itself without keys. The map is linear
    and its own adjoint."""
    if keys is None or probability == 0:
        return x
    mask = keep_mask(keys, place, x.shape[1:], probability, x.device)
    return x * mask.to(x.dtype).mul_(1 / (1 - probability))
