"""A GPT: pre-LN transformer blocks on token and position embeddings (Radford et al., 2019)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-LN transformer block, [batch, sequence, dim] -> the same shape.

    Args:
        dim: width.
        heads: attention heads; a divisor of ``dim``.
        dropout: probability, of attention weights and of both residual increments.
        depth: number of blocks in the model: projections onto the residual stream start smaller by sqrt(2 depth).
            The layer-parallel solver relies on such small increments.
        ffn: inner width of the second half; 0: 4 dim.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, depth: int = 1, ffn: int = 0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, ffn or 4 * dim), nn.Linear(ffn or 4 * dim, dim)
        for linear in (self.qkv, self.up, self.proj, self.down):
            onto_stream = linear in (self.proj, self.down)
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * depth) if onto_stream else 0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._drop(self.proj(self._attend(self.ln1(x))))
        return x + self._drop(self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh")))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, sequence, dim = x.shape
        q, k, v = self.qkv(x).view(batch, sequence, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return y.transpose(1, 2).reshape(batch, sequence, dim)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """Next-token logits, [batch, sequence] int64 -> [batch, sequence, vocabulary].

    ``blocks`` may be replaced by ``LayerParallel(model.blocks, ...)``.

    Args:
        vocabulary: number of tokens.
        sequence: longest input.
        layers, dim, heads, dropout: of the blocks.
        tied: use the token embedding as the output matrix.
        ffn: of the blocks.
    """

    def __init__(
        self,
        vocabulary: int,
        sequence: int,
        layers: int,
        dim: int,
        heads: int,
        dropout: float = 0.0,
        tied: bool = True,
        ffn: int = 0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(sequence, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, dropout, layers, ffn) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        for module in (self.tokens, self.positions, self.head):
            nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.head(self.norm(self.blocks(x)))
