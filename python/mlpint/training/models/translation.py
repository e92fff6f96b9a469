"""An encoder-decoder transformer, its layers on one time line (see mlpint.nn.encoder_decoder), and its decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ...nn import DecoderBlock, EncoderBlock
from ...nn.attention import split_heads
from .blocks import encoder_decoder_blocks
from .shape import Shape


class Translator(nn.Module):
    """Next-token logits of a translation, [B, T, vocabulary], for source tokens [B, S] and target tokens [B, T].

    Embeddings are scaled to unit variance and share one table with the output layer; positions are sinusoids (Vaswani
    et al., 2017), so that no length is too long. ``blocks`` may be replaced by ``LayerParallel(model.blocks, ...)``.

    Args:
        vocabulary: number of tokens, of both languages.
        shape: of the layers.
        encoder_layers: those of them that are the encoder's; both parts have at least one.
        tied: use the token embedding as the output matrix.
    """

    def __init__(self, vocabulary: int, shape: Shape, encoder_layers: int, tied: bool = True) -> None:
        super().__init__()
        self.dim = shape.dim
        self.tokens = nn.Embedding(vocabulary, shape.dim)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = encoder_decoder_blocks(shape, encoder_layers)
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, vocabulary, bias=False)
        for module in (self.tokens, self.head):
            nn.init.normal_(module.weight, std=shape.dim**-0.5)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits for what follows each target token.

        Args:
            source: [B, S] tokens, padded at the end with any.
            lengths: [B] number of tokens without the padding, at least 1.
            target: [B, T] tokens, the first of them a start token.
        """
        return self.logits(self.states(source, lengths, target))

    def states(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What the logits are made of, [B, T, dim]."""
        _, y = self.blocks((self.embed(source), self.embed(target)), lengths)
        return y

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of any number of states, [..., dim] -> [..., vocabulary]."""
        return self.head(self.norm(states))

    def embed(self, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
        """[B, T] tokens at the places from ``start`` on -> [B, T, dim]."""
        x = self.tokens(tokens) * math.sqrt(self.dim)
        return self.dropout(x + sinusoids(start, tokens.shape[1], self.dim, x.device).to(x.dtype))


def sinusoids(start: int, count: int, dim: int, device: torch.device) -> torch.Tensor:
    """Positions start, start + 1, ...: [count, dim], sines of falling frequencies and then their cosines."""
    half = dim - dim // 2
    frequencies = torch.exp(torch.arange(half, device=device, dtype=torch.float64) * (-math.log(1e4) / half))
    angles = torch.arange(start, start + count, device=device, dtype=torch.float64).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim]


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


class Stepwise:
    """A translator that goes through the source once and through the target token by token.

    What earlier tokens gave is kept, so that a token costs one position and not the whole sequence again. The layers
    have to be here, all of them: for a layer-parallel model take :func:`mlpint.parallel.gather_model.gather_model`.

    Args:
        model: in eval mode.
        source, lengths: as for :class:`Translator`.
        step_sizes: h of x + h (layer(x) - x) by layer; 1 by default.
    """

    def __init__(
        self,
        model: Translator,
        source: torch.Tensor,
        lengths: torch.Tensor,
        step_sizes: Sequence[float] | None = None,
    ) -> None:
        self.model = model
        places = torch.arange(source.shape[1], device=lengths.device)
        self._mask = (places < lengths.unsqueeze(1))[:, None, None, :]  # [B, 1, 1, S]
        pairs = list(zip(model.blocks, step_sizes or [1.0] * len(model.blocks), strict=True))
        x, y = model.embed(source), source.new_empty(0)
        for layer, h in pairs:
            if isinstance(layer, EncoderBlock):
                x = _moved(x, layer((x, y), lengths)[0], h)
        self._decoder = [(layer, h) for layer, h in pairs if isinstance(layer, DecoderBlock)]
        self._caches = [_empty_cache(layer, x) for layer, _ in self._decoder]
        self.length = 0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """What may follow the next token of each target: [B] -> [B, vocabulary]."""
        y = self.model.embed(tokens.unsqueeze(1), self.length)
        for i, (layer, h) in enumerate(self._decoder):
            new, self._caches[i] = _extended(layer, y, self._caches[i], self._mask)
            y = _moved(y, new, h)
        self.length += 1
        return self.model.logits(y)[:, 0]

    def expand(self, count: int) -> None:
        """Goes on with ``count`` copies of each target, next to each other."""
        self._caches = [Cache(*(t.repeat_interleave(count, 0) for t in cache)) for cache in self._caches]
        self._mask = self._mask.repeat_interleave(count, 0)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with other targets: row i is what row ``rows[i]`` was, which has the same source."""
        self._caches = [
            cache._replace(keys=cache.keys.index_select(0, rows), values=cache.values.index_select(0, rows))
            for cache in self._caches
        ]


def _empty_cache(layer: Any, x: torch.Tensor) -> Cache:
    """The cache of a target without tokens, for the encoder's output."""
    keys, values = _heads(layer, layer.cross_kv(layer.ln_memory(x)), 2)
    return Cache(keys[:, :, :0], values[:, :, :0], keys, values)


def _extended(layer: Any, y: torch.Tensor, cache: Cache, mask: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """A decoder layer at one more token, [B, 1, D], after those in the cache."""
    q, k, v = _heads(layer, layer.qkv(layer.ln1(y)), 3)
    keys, values = torch.cat([cache.keys, k], 2), torch.cat([cache.values, v], 2)
    y = y + layer.proj(_attended(q, keys, values))
    (q,) = _heads(layer, layer.cross_q(layer.ln_cross(y)), 1)
    y = y + layer.cross_proj(_attended(q, cache.source_keys, cache.source_values, mask))
    y = y + layer.down(F.gelu(layer.up(layer.ln2(y)), approximate="tanh"))
    return y, Cache(keys, values, cache.source_keys, cache.source_values)


def _heads(layer: Any, x: torch.Tensor, parts: int) -> Sequence[torch.Tensor]:
    """[B, T, parts D] -> so many [B, H, T, hd]."""
    return split_heads(x.flatten(0, 1)[None], len(x), layer.settings.heads, parts)


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[B, H, T, hd] queries -> [B, T, D]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _moved(old: torch.Tensor, new: torch.Tensor, h: float) -> torch.Tensor:
    return new if h == 1 else torch.lerp(old, new, h)
