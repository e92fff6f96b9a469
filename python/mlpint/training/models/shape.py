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
        llama: whether layers are Llama's (RMSNorm, rotary positions, SwiGLU, no biases) and not GPT-2's.
        kv_heads: Llama's heads of keys and values, a divisor of ``heads``; 0: as many.
    """

    layers: int
    dim: int
    heads: int
    ffn: int = 0
    dropout: float = 0.0
    llama: bool = False
    kv_heads: int = 0

    @property
    def ffn_width(self) -> int:
        """``ffn``, or 4 dim; Llama's third matrix makes that 8 / 3 dim, in eights."""
        return self.ffn or (-(-self.dim // 3) * 8 if self.llama else 4 * self.dim)
