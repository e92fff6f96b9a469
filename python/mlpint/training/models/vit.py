"""A vision transformer: an encoder on patches of an image (Dosovitskiy et al., 2021)."""

from __future__ import annotations

import math

import torch
from torch import nn

from .blocks import encoder_blocks, normal_
from .shape import Shape


class ViT(nn.Module):
    """Logits of the classes, [batch, channels, height, width] -> [batch, classes].

    ``blocks`` may be replaced by ``LayerParallel(model.blocks, ...)``.

    Args:
        size: (channels, height, width) of the images.
        patch: side of a patch; divides height and width.
        classes: number of classes.
        shape: of the blocks.

    Raises:
        ValueError: the patches do not cover the images.
    """

    def __init__(self, size: tuple[int, int, int], patch: int, classes: int, shape: Shape) -> None:
        super().__init__()
        channels, height, width = size
        if height % patch or width % patch:
            raise ValueError(f"patch = {patch}: must divide the images' size, {height} x {width}")
        self.patches = nn.Conv2d(channels, shape.dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.positions = nn.Parameter(torch.empty(1, (height // patch) * (width // patch) + 1, shape.dim))
        # It is there for the reason that it is in :class:`BERT`; the original has none.
        self.embedding_norm = nn.LayerNorm(shape.dim)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = encoder_blocks(shape)
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, classes)
        # Patches of pixels of deviation 1 come out as large as positions: otherwise where a patch is gets lost next to
        # what is in it.
        nn.init.normal_(self.positions, std=0.02)
        normal_(self.patches, std=0.02 / math.sqrt(channels * patch**2))
        normal_(self.head)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits(self.states(images))

    def states(self, images: torch.Tensor) -> torch.Tensor:
        """What the logits are made of, [batch, dim]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = self.embedding_norm(torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions)
        return self.blocks(self.dropout(x))[:, 0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of any number of states, [..., dim] -> [..., classes]."""
        return self.head(self.norm(states))
