"""Dropout masks that are a function of a key and a place alone.

Element i of the mask at a place of a layer is number i of the SplitMix64 sequence (Steele et al., OOPSLA 2014) that
starts at the layer's key mixed with the place. No generator moves on, so that a layer can be evaluated anywhere, any
number of times, alone or with others in one call, and its backward makes the mask again instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import random_keys

ATTENTION, PROJECTION, FFN = range(3)  # places in a block: attention weights, and the outputs of both halves

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same bits: torch's products wrap around as those of uint64 do."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _xor_shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))  # int64 shifts in the sign: the mask makes it a logical shift


def keep_mask(
    keys: Sequence[int], place: int, shape: Sequence[int], probability: float, device: torch.device
) -> torch.Tensor:
    """The mask [J, *shape], one row for each key: True where an element is kept."""
    count = 1
    for size in shape:
        count *= size
    starts = [_signed(random_keys.key(key, place, 0, 0)) for key in keys]
    z = torch.arange(1, count + 1, device=device) * _signed(_GOLDEN)
    z = z + torch.tensor(starts, device=device).unsqueeze(1)
    z = _xor_shift(_xor_shift(z, 30) * _signed(_MIX1), 27) * _signed(_MIX2)
    z = _xor_shift(z, 31)
    return (z >= int(probability * 2.0**64) - 2**63).view(len(starts), *shape)


def dropped(x: torch.Tensor, keys: Sequence[int] | None, place: int, probability: float) -> torch.Tensor:
    """Returns x [J, ...] with dropped elements zero and the others scaled up; x itself without keys. The map is linear
    and its own adjoint."""
    if keys is None or probability == 0:
        return x
    mask = keep_mask(keys, place, x.shape[1:], probability, x.device)
    return x * mask.to(x.dtype).mul_(1 / (1 - probability))
