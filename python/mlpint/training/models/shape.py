"""The size of a transformer, by which every model here is made."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the layers of a transformer have in common.

    Attributes:
        layers: their number; of a translator those of encoder and decoder together.
        dim: width.
        heads: attention heads; a divisor of ``dim``.
        ffn: inner width of a layer's second half; 0: 4 dim.
        dropout: probability, of attention weights, of all residual increments and outside the layers.
    """

    layers: int
    dim: int
    heads: int
    ffn: int = 0
    dropout: float = 0.0

    @property
    def ffn_width(self) -> int:
        return self.ffn or 4 * self.dim
