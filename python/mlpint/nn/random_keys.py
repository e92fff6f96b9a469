"""Keys for random numbers: one number for each (seed, step, microbatch, layer).

A block that makes its dropout masks from a key makes the same mask wherever and however often it is evaluated.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def key(seed: int, step: int, microbatch: int, layer: int) -> int:
    """A 64-bit key for the four numbers: SplitMix64 (Steele et al., OOPSLA 2014) over each in turn."""
    state = 0
    for value in (seed, step, microbatch, layer):
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def draw_key(generator: torch.Generator | None = None) -> int:
    """A key for one evaluation of a layer that makes its random numbers itself; from torch's generator by default."""
    return int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
