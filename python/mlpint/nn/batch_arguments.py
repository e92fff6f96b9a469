"""What blocks are told of one batch beside the state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .attending import Attending, GivenMasks, Padding, seen_in
from .cross_attention import Remembering
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
        memory_lengths: [B] integers; what a decoder attends to in the memory ends there.
    """

    def __init__(
        self,
        lengths: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        rotation: Rotation | None = None,
        memory_lengths: torch.Tensor | None = None,
    ) -> None:
        self.lengths, self.attention_mask, self.rotation = lengths, attention_mask, rotation
        self.memory_lengths = memory_lengths
        if lengths is not None and attention_mask is not None:
            raise ValueError("lengths and attention_mask are two ways to say what is padding: give one of them")
        self._attending: dict[tuple[int, ...], Attending] = {}
        self._padding: Padding | None = None
        self._remembering: Remembering | None = None

    def check(self, settings: BlockSettings, x: torch.Tensor, memory: torch.Tensor | None = None) -> None:
        """Raises a ValueError where these do not go with a state [B, T, D] and a memory of such blocks."""
        settings.check_state(x)
        batch, sequence, _ = x.shape
        _check_lengths("lengths", self.lengths, batch)
        _check_lengths("memory_lengths", self.memory_lengths, batch)
        self._check_memory(settings, batch, memory)
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

    def _check_memory(self, settings: BlockSettings, batch: int, memory: torch.Tensor | None) -> None:
        if not settings.cross:
            if memory is not None or self.memory_lengths is not None:
                raise ValueError("memory and memory_lengths go with cross = True, and these blocks attend to none")
            return
        if memory is None:
            raise ValueError(f"memory is missing: blocks with cross = True attend to one, [{batch}, S, {settings.dim}]")
        if memory.dim() != 3 or memory.shape[0] != batch or memory.shape[2] != settings.dim:
            raise ValueError(f"memory is {tuple(memory.shape)}: must be [{batch}, S, {settings.dim}]")

    def remembering(self, settings: BlockSettings, memory: torch.Tensor) -> Remembering:
        """What attention to a memory [B, S, D] is told, the same by all layers."""
        if self._remembering is None:
            padding = None if self.memory_lengths is None else Padding(self.memory_lengths, memory.shape[1])
            self._remembering = Remembering(len(memory), settings.heads, settings.scale, padding)
        return self._remembering

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


def _check_lengths(name: str, lengths: torch.Tensor | None, batch: int) -> None:
    if lengths is None:
        return
    tensor = isinstance(lengths, torch.Tensor)
    if not tensor or lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        got = f"{lengths.dtype} of shape {tuple(lengths.shape)}" if tensor else f"a {type(lengths).__name__}"
        raise ValueError(f"{name} is {got}: must be an integer tensor with one entry for each of {batch} rows")
