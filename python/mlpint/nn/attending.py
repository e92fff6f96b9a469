"""Who attends to whom: causality, windows, lengths, given masks; what attention is told beside queries and keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

Windows = tuple[int, ...] | None


def masked(dtype: torch.dtype) -> float:
    """What is added to scores of keys not to be seen: finite, twice too, so that a row without any key stays finite."""
    return max(-1e30, torch.finfo(dtype).min / 4)


class Padding:
    """Key lengths of one batch, in the forms that attention asks for."""

    def __init__(self, lengths: torch.Tensor, sequence: int) -> None:
        self.lengths = lengths
        positions = torch.arange(sequence, device=lengths.device)
        self.padded = positions >= lengths.unsqueeze(1)  # [B, T]
        self._biases: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    @functools.cached_property
    def surely_none_empty(self) -> bool:
        """Whether every row of the batch has a token, as far as can be told without waiting for a GPU."""
        return self.lengths.device.type == "cpu" and bool((self.lengths > 0).all())

    def bias(self, j: int, dtype: torch.dtype) -> torch.Tensor:
        """The mask that is added to the scores of J batches, [J B, 1, 1, T]."""
        if (j, dtype) not in self._biases:
            bias = torch.zeros(self.padded.shape, dtype=dtype, device=self.padded.device)
            bias = bias.masked_fill_(self.padded, masked(dtype))
            self._biases[j, dtype] = bias.repeat(j, 1)[:, None, None, :]
        return self._biases[j, dtype]

    def clear(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x [J, B, T, ...] with zeros where there is padding."""
        padded = self.padded.reshape(1, *self.padded.shape, *[1] * (x.dim() - 3))
        return x.masked_fill(padded, 0)


class GivenMasks:
    """Masks of J layers in the place of causality, windows and lengths.

    Args:
        masks: one for each of the layers, [B or 1, 1, T or 1, T]: booleans, True where a token (row) sees another, or
            what is added to the scores. A token that booleans let see none gets 0 from attention.
        batch, sequence: B and T.
    """

    def __init__(self, masks: Sequence[torch.Tensor], batch: int, sequence: int) -> None:
        self._masks = [mask.expand(batch, 1, sequence, sequence) for mask in masks]
        alone = [mask.logical_not().all(-1) if mask.dtype == torch.bool else None for mask in self._masks]
        self._blind: torch.Tensor | None = None  # [J, B, T]
        if any(rows is not None and rows.any() for rows in alone):
            none = torch.zeros(self._masks[0].shape[:3], dtype=torch.bool, device=masks[0].device)
            self._blind = torch.stack([none if rows is None else rows for rows in alone])[:, :, 0]
        self._biases: dict[torch.dtype, torch.Tensor] = {}

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores, [J B, 1, T, T]."""
        if dtype not in self._biases:
            self._biases[dtype] = torch.cat([_added(mask, dtype) for mask in self._masks])
        return self._biases[dtype]

    def clear(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x [J, B, T, ...] with zeros where a token sees none."""
        if self._blind is None:
            return x
        return x.masked_fill(self._blind.reshape(*self._blind.shape, *[1] * (x.dim() - 3)), 0)


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, masked(dtype))
    return mask.to(dtype).clamp(min=masked(dtype))  # not -inf, of which a row of none would make NaNs


@dataclasses.dataclass(frozen=True, eq=False)
class Attending:
    """What the attention of J layers over one batch is told beside queries, keys and values.

    Attributes:
        batch, heads: B and H.
        causal: whether a token sees itself and those before it only.
        scale: factor of the scores.
        padding: how long the rows of the batch are. Padded queries get 0.
        windows: for each of the J layers, how far away tokens are seen (less than so many places); None: all are.
        given: masks that stand for all of these but the scale.
    """

    batch: int
    heads: int
    causal: bool
    scale: float
    padding: Padding | None = None
    windows: Windows = None
    given: GivenMasks | None = None

    @property
    def by_lengths(self) -> bool:
        """Whether causality and lengths say all, as the kernels take it."""
        return self.windows is None and self.given is None

    def mask(self, qkv: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
        """What is added to the scores of qkv [J, B T, 3 D], to be broadcast to [J B, H, T, T], and whether causality
        comes on top."""
        j, m, _ = qkv.shape
        if self.given is not None:
            return self.given.bias(qkv.dtype), False
        # Under a causal mask padded queries alone see padded keys, and their output is cleared.
        bias = None if self.causal or self.padding is None else self.padding.bias(j, qkv.dtype)
        if self.windows is None:
            return bias, self.causal
        inside = _window_bias(self.windows, self.causal, m // self.batch, qkv.dtype, qkv.device)
        inside = inside[:, None, None].expand(-1, self.batch, -1, -1, -1).flatten(0, 1)
        return inside if bias is None else inside + bias, False

    def clear(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x [J, B, T, ...] with zeros for the tokens that see none."""
        hiding = self.given or self.padding
        return x if hiding is None else hiding.clear(x)


@functools.lru_cache(maxsize=64)
def _window_bias(
    windows: tuple[int, ...], causal: bool, sequence: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return _added(seen_in(windows, causal, sequence, device), dtype)


def seen_in(windows: tuple[int, ...], causal: bool, sequence: int, device: torch.device) -> torch.Tensor:
    """[J, T, T]: whether a token of the layer sees another."""
    places = torch.arange(sequence, device=device)
    back = places[:, None] - places
    reach = torch.tensor(windows, device=device)[:, None, None]
    return (back < reach) & (back >= 0 if causal else back > -reach)
