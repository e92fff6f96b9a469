"""The layers of a translator: pre-LN attention to one's own stream, to the other one, and the feed-forward part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import initial_deviation
from .shape import Shape

State = tuple[torch.Tensor, torch.Tensor]


class Cache(NamedTuple):
    """What a decoder layer keeps of the source and of the target's earlier tokens.

    Attributes:
        keys, values: of the target so far, [B, H, t, hd].
        source_keys, source_values: [B, H, S, hd].
    """

    keys: torch.Tensor
    values: torch.Tensor
    source_keys: torch.Tensor
    source_values: torch.Tensor


class Part(nn.Module):
    """Heads and dropout, which all parts of a layer have."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.drop = shape.heads, nn.Dropout(shape.dropout)

    def split(self, x: torch.Tensor, parts: int) -> Sequence[torch.Tensor]:
        """[B, T, parts D] -> so many [B, H, T, hd]."""
        batch, length, width = x.shape
        return x.view(batch, length, parts, self.heads, width // parts // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """[B, H, T, hd] queries -> [B, T, D]."""
        p = self.drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)
        return y.transpose(1, 2).flatten(2)


class SelfAttention(Part):
    """Increment of a stream by attention to itself, [B, T, D] -> the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        dim = shape.dim
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
        q, k, v = self.split(self.qkv(self.norm(x)), 3)
        return self.drop(self.proj(self.attend(q, k, v, mask, causal)))

    def extend(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The increment of one more token, [B, 1, D], and the keys and values of all of them."""
        q, k, v = self.split(self.qkv(self.norm(x)), 3)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return self.proj(self.attend(q, keys, values)), keys, values


class CrossAttention(Part):
    """Increment of a stream by attention to another one, which it sees through a LayerNorm of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        dim = shape.dim
        self.norm, self.source_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, y: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        keys, values = self.source(x)
        return self.drop(self.increment(y, keys, values, mask))

    def source(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Keys and values of the other stream, [B, H, S, hd]."""
        return self.split(self.key_value(self.source_norm(x)), 2)

    def increment(self, y: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.proj(self.attend(self.split(self.query(self.norm(y)), 1)[0], k, v, mask))


class FeedForward(Part):
    """Increment of a stream place by place."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        dim, ffn = shape.dim, shape.ffn_width
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, ffn), nn.Linear(ffn, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.down(F.gelu(self.up(self.norm(x)), approximate="tanh")))


class EncoderLayer(nn.Module):
    """Moves X and keeps Y: (X [B, S, D], Y [B, T, D]) -> the same shapes.

    Args:
        shape: of all layers.
        depth: number of layers that move this stream: projections onto it start smaller for that.
    """

    def __init__(self, shape: Shape, depth: int) -> None:
        super().__init__()
        self.attention = SelfAttention(shape)
        self.ffn = FeedForward(shape)
        initialize(self, shape.dim, 2 * depth)

    def forward(self, state: State, source_mask: torch.Tensor) -> State:
        """source_mask: [B, 1, 1, S] bool, which places of X hold tokens."""
        x, y = state
        return self.encode(x, source_mask), y

    def encode(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, mask)
        return x + self.ffn(x)


class DecoderLayer(nn.Module):
    """Moves Y by causal attention to itself and by attention to X, which it keeps.

    Its arguments are those of :class:`EncoderLayer`.
    """

    def __init__(self, shape: Shape, depth: int) -> None:
        super().__init__()
        self.attention = SelfAttention(shape)
        self.ffn = FeedForward(shape)
        self.cross = CrossAttention(shape)
        initialize(self, shape.dim, 3 * depth)

    def forward(self, state: State, source_mask: torch.Tensor) -> State:
        x, y = state
        y = y + self.attention(y, causal=True)
        y = y + self.cross(y, x, source_mask)
        return x, y + self.ffn(y)

    def cache(self, x: torch.Tensor) -> Cache:
        """The cache of a target without tokens, for the encoder's output."""
        keys, values = self.cross.source(x)
        return Cache(keys[:, :, :0], values[:, :, :0], keys, values)

    def extend(self, y: torch.Tensor, cache: Cache, source_mask: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        """One more token, [B, 1, D], after those in the cache."""
        increment, keys, values = self.attention.extend(y, cache.keys, cache.values)
        y = y + increment
        y = y + self.cross.increment(y, cache.source_keys, cache.source_values, source_mask)
        return y + self.ffn(y), Cache(keys, values, cache.source_keys, cache.source_values)


def initialize(layer: nn.Module, dim: int, increments: int) -> None:
    """Linear maps start with :func:`initial_deviation`; projections onto the stream smaller by the root of the number
    of increments it gets, since the layer-parallel solver relies on small increments."""
    std = initial_deviation(dim)
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            onto_stream = name.endswith((".proj", ".down"))
            nn.init.normal_(module.weight, std=std / math.sqrt(increments) if onto_stream else std)
            nn.init.zeros_(module.bias)
