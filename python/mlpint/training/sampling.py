"""Text from a trained model."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..comm.communicator import Comm


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: list[int],
    count: int,
    *,
    sequence: int,
    seed: int,
    comm: Comm,
    device: torch.device | str = "cpu",
    temperature: float = 0.8,
) -> list[int]:
    """Draws ``count`` tokens, one after the other, and returns them. Collective.

    Args:
        model: logits [1, t, vocabulary] for tokens [1, t].
        prompt: at least one token to go on from.
        count: how many tokens.
        sequence: longest input of the model; older tokens are forgotten.
        seed: of the draws.
        comm: rank 0 draws for all.
        temperature: logits are divided by it.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    tokens = list(prompt)
    for _ in range(count):
        window = torch.tensor([tokens[-sequence:]], device=device)
        logits = model(window)[0, -1].double() / temperature
        cumulative = logits.softmax(0).cumsum(0).cpu()
        drawn = torch.searchsorted(cumulative, generator.random() * float(cumulative[-1]), right=True)
        drawn = drawn.clamp(max=len(cumulative) - 1).reshape(1)
        tokens.append(int(comm.broadcast(drawn, 0)))
    return tokens[len(prompt) :]
