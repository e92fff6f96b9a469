"""The number of independent blocks to evaluate in one go."""

from __future__ import annotations

import torch

# On a CPU a batched step saves what it costs to call an operation, but its activations have to stay in a core's L2
# cache between operations, as those of a single block do. Channels x rows x blocks from which that was measured to turn
# (benchmarks/block_stack.py, L2 of 1 MiB: the FFN's activations in fp32 fill it then): 32 blocks of d 64 with 32 rows
# at once, 2 of d 64 with 512, one of d 256 with 256.
CPU_ELEMENTS = 65536


def width(count: int, m: int, d: int, device: torch.device) -> int:
    """The number of blocks to take together, of ``count`` that could be; 1 is the loop over them.

    Args:
        m: rows of one block's state, batch x sequence.
        d: width of that state.
    """
    if device.type != "cpu":
        return count
    return min(count, max(1, CPU_ELEMENTS // (m * d)))
