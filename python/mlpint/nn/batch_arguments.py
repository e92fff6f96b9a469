"""What blocks are told of one batch beside the state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .attending import Attending, GivenMasks, Padding, seen_in
from .settings import BlockSettings

Rotation = tuple[torch.Tensor, torch.Tensor]


class BatchArguments:
    """The arguments of one batch, in the forms that steps ask for.

    Args:
        lengths: [B] integers; keys from there on are not attended to, and what a query from there on would attend to
            counts as 0.
        attention_mask: [B or 1, 1, T or 1, T] in the place of causality and windows: booleans, True where a token sees
            another, or numbers added to the scores. Or one of these, or None, for each layer by its index.
        rotation: cosine and sine of rotary positions in the place of those of 0, 1, ..., T - 1: [B or 1, T, hd / 2]
            each.
    """

    def __init__(
        self,
        lengths: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        self.lengths, self.attention_mask, self.rotation = lengths, attention_mask, rotation
        if lengths is not None and attention_mask is not None:
            raise ValueError("lengths and attention_mask are two ways to say what is padding: give one of them")
        self._attending: dict[tuple[int, ...], Attending] = {}
        self._padding: Padding | None = None

    def check(self, settings: BlockSettings, x: torch.Tensor) -> None:
        """Raises a ValueError where these do not go with a state [B, T, D] of such blocks."""
        settings.check_state(x)
        batch, sequence, _ = x.shape
        lengths = self.lengths
        if lengths is not None and (
            not isinstance(lengths, torch.Tensor)
            or lengths.shape != x.shape[:1]
            or lengths.is_floating_point()
            or lengths.dtype == torch.bool
        ):
            got = (
                f"{lengths.dtype} of shape {tuple(lengths.shape)}"
                if isinstance(lengths, torch.Tensor)
                else f"a {type(lengths).__name__}"
            )
            raise ValueError(f"lengths is {got}: must be an integer tensor with one entry for each of {batch} rows")
        masks = self.attention_mask
        for mask in (masks,) if masks is None or isinstance(masks, torch.Tensor) else dict.fromkeys(masks):
            if mask is None:
                continue
            shape = tuple(mask.shape)
            fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] == 1
            if not fits or shape[2] not in (1, sequence) or shape[3] != sequence:
                raise ValueError(
                    f"attention_mask is {shape}: must be [{batch} or 1, 1, {sequence} or 1, {sequence}], alike for all "
                    "heads"
                )
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise ValueError(f"attention_mask is {mask.dtype}: must be torch.bool, or numbers added to the scores")
        if self.rotation is not None:
            if settings.positions != "rotary":
                raise ValueError(f"rotation goes with positions = 'rotary', and these are {settings.positions!r}")
            for table in self.rotation:
                if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[1] != sequence:
                    raise ValueError(f"rotation is {tuple(table.shape)}: must be [{batch} or 1, {sequence}, hd / 2]")

    def attending(self, settings: BlockSettings, layers: Iterable[int], batch: int, sequence: int) -> Attending:
        """What the attention of so many layers, by their indices, is told."""
        key = tuple(layers) if self.attention_mask is not None or any(settings.window_pattern) else ()
        if key not in self._attending:
            self._attending[key] = self._made(settings, key, batch, sequence)
        return self._attending[key]

    def _made(self, settings: BlockSettings, layers: tuple[int, ...], batch: int, sequence: int) -> Attending:
        shape = batch, settings.heads, settings.causal, settings.scale
        windows = settings.windows(layers, sequence)
        given = self.attention_mask
        masks = (
            [given] * len(layers) if given is None or isinstance(given, torch.Tensor) else [given[n] for n in layers]
        )
        present = [mask for mask in masks if mask is not None]
        if present:
            # Beside layers that are given one, others go by their settings.
            own = seen_in(windows or (sequence,) * len(layers), settings.causal, sequence, present[0].device)
            every = [own[i][None, None] if mask is None else mask for i, mask in enumerate(masks)]
            return Attending(*shape, given=GivenMasks(every, batch, sequence))
        if self.lengths is not None and self._padding is None:
            self._padding = Padding(self.lengths, sequence)
        return Attending(*shape, self._padding, windows)
