"""An encoder-decoder transformer on one time line: every layer acts on the pair (X, Y) of both its streams.

Encoder layers move X and keep Y, decoder layers move Y and keep X, which is then the encoder's output (arXiv
2601.09026, eq. (2)-(3)); so that all layers together are one stack, which ``LayerParallel`` takes as any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .shape import Shape
from .translation_layers import Cache, DecoderLayer, EncoderLayer, State


class Layers(nn.ModuleList):
    """Encoder layers, then decoder layers, run one after the other."""

    def forward(self, state: State, source_mask: torch.Tensor) -> State:
        for layer in self:
            state = layer(state, source_mask)
        return state


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
        self.dim, decoder_layers = shape.dim, shape.layers - encoder_layers
        self.tokens = nn.Embedding(vocabulary, shape.dim)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = Layers(
            [
                *(EncoderLayer(shape, encoder_layers) for _ in range(encoder_layers)),
                *(DecoderLayer(shape, decoder_layers) for _ in range(decoder_layers)),
            ]
        )
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
        _, y = self.blocks((self.embed(source), self.embed(target)), key_mask(lengths, source.shape[1]))
        return y

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of any number of states, [..., dim] -> [..., vocabulary]."""
        return self.head(self.norm(states))

    def embed(self, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
        """[B, T] tokens at the places from ``start`` on -> [B, T, dim]."""
        x = self.tokens(tokens) * math.sqrt(self.dim)
        return self.dropout(x + sinusoids(start, tokens.shape[1], self.dim, x.device).to(x.dtype))


def key_mask(lengths: torch.Tensor, count: int) -> torch.Tensor:
    """Which of ``count`` keys may be attended to, [B, 1, 1, count] bool."""
    return (torch.arange(count, device=lengths.device) < lengths.unsqueeze(1))[:, None, None, :]


def sinusoids(start: int, count: int, dim: int, device: torch.device) -> torch.Tensor:
    """Positions start, start + 1, ...: [count, dim], sines of falling frequencies and then their cosines."""
    half = dim - dim // 2
    frequencies = torch.exp(torch.arange(half, device=device, dtype=torch.float64) * (-math.log(1e4) / half))
    angles = torch.arange(start, start + count, device=device, dtype=torch.float64).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim]


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
        self.model, self.mask = model, key_mask(lengths, source.shape[1])
        pairs = list(zip(model.blocks, step_sizes or [1.0] * len(model.blocks), strict=True))
        x = model.embed(source)
        for layer, h in pairs:
            if isinstance(layer, EncoderLayer):
                x = _moved(x, layer.encode(x, self.mask), h)
        self._decoder = [(layer, h) for layer, h in pairs if isinstance(layer, DecoderLayer)]
        self._caches = [layer.cache(x) for layer, _ in self._decoder]
        self.length = 0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """What may follow the next token of each target: [B] -> [B, vocabulary]."""
        y = self.model.embed(tokens.unsqueeze(1), self.length)
        for i, (layer, h) in enumerate(self._decoder):
            new, self._caches[i] = layer.extend(y, self._caches[i], self.mask)
            y = _moved(y, new, h)
        self.length += 1
        return self.model.logits(y)[:, 0]

    def expand(self, count: int) -> None:
        """Goes on with ``count`` copies of each target, next to each other."""
        self._caches = [Cache(*(t.repeat_interleave(count, 0) for t in cache)) for cache in self._caches]
        self.mask = self.mask.repeat_interleave(count, 0)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with other targets: row i is what row ``rows[i]`` was, which has the same source."""
        self._caches = [
            cache._replace(keys=cache.keys.index_select(0, rows), values=cache.values.index_select(0, rows))
            for cache in self._caches
        ]


def _moved(old: torch.Tensor, new: torch.Tensor, h: float) -> torch.Tensor:
    return new if h == 1 else torch.lerp(old, new, h)
