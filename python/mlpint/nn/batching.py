"""How many independent blocks to evaluate in one go."""

from __future__ import annotations

import torch


def width(count: int, m: int, d: int, device: torch.device) -> int:
    """Blocks to take together, of ``count`` that could be; 1 is the loop over them.

    Args:
        m: rows of one block's state, batch x sequence.
        d: its width.
    """
    return count
