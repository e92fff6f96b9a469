"""A GPT of half the width made one of full width, by duplication: the function stays, to rounding.

Every channel of the residual stream, every attention head and every unit of the feed-forward part gets a twin (as
arXiv 2404.07999 de-coalesces networks, by our own code): maps out of a duplicated space have half their weights, so
that twins together say what the one said. Twins would stay twins for ever, since their gradients are equal, so the wide
network is averaged with a freshly drawn one.
"""

from __future__ import annotations

import torch

from mlpint.training.models import GPT


def _channels(dim: int) -> torch.Tensor:
    """Where each channel of a space of twice the size comes from: twins stand next to each other."""
    return torch.arange(2 * dim) // 2


def _heads(dim: int, heads: int) -> torch.Tensor:
    """The same, head by head."""
    return torch.arange(dim).view(heads, -1).repeat_interleave(2, 0).flatten()


@torch.no_grad()
def widen(narrow: GPT, wide: GPT, heads: int, share: float = 1.0) -> None:
    """Averages the narrow network, duplicated, into one of twice its width and twice its heads.

    Args:
        narrow, wide: of equal depth and a tied head.
        heads: of the narrow one.
        share: of the narrow one in the average; at 1 the wide one is the same function.
    """
    dim = narrow.tokens.embedding_dim
    stream, attention = _channels(dim), _heads(dim, heads)
    triple = torch.cat([attention + part * dim for part in range(3)])
    hidden = _channels(narrow.blocks[0].up.out_features)
    rows = {"qkv": triple, "proj": stream, "up": hidden, "down": stream, "ln1": stream, "ln2": stream}
    columns = {"qkv": stream, "proj": attention, "up": stream, "down": hidden}
    targets = dict(wide.named_parameters())
    for name, value in narrow.named_parameters():
        module, _, kind = name.rpartition(".")
        part = module.rpartition(".")[2]
        if part in ("tokens", "positions"):
            value = value[:, stream]
        elif part == "norm":
            value = value[stream] / 2  # the head is the embedding, duplicated, and would say everything twice
        elif kind == "weight" and part in columns:
            value = value[rows[part]][:, columns[part]] / 2
        else:
            value = value[rows[part]]
        targets[name].lerp_(value, share)
