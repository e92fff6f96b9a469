"""An encoder-decoder on one time line: every layer acts on the pair (X, Y) of both streams.

Encoder layers move X and keep Y; decoder layers move Y and keep X, which is then the encoder's output, their memory
(arXiv 2601.09026, eq. (2)-(3)). So all layers together are one stack, which ``LayerParallel`` takes as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .batch_arguments import BatchArguments
from .block import Block
from .random_keys import draw_key
from .stack import BlockStack

Pair = tuple[torch.Tensor, torch.Tensor]


def as_pair(state: Any) -> Pair:
    """The state, if it is both streams; a tensor of two rows would come apart, too.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(state, tuple | list) or len(state) != 2:
        got = f"{len(state)} tensors" if isinstance(state, tuple | list) else f"a {type(state).__name__}"
        raise TypeError(f"layers of an encoder-decoder take the pair (X, Y) of both streams as their state, not {got}")
    return state[0], state[1]


class EncoderBlock(Block):
    """A :class:`Block` of the encoder: (X [B, S, D], Y [B, T, D]) -> (moved X, Y)."""

    def forward(self, state: Pair, lengths: torch.Tensor | None = None) -> Pair:  # type: ignore[override]
        """One step; ``lengths``: [B] tokens of X without padding."""
        x, y = as_pair(state)
        return super().forward(x, lengths), y


class DecoderBlock(Block):
    """A :class:`Block` with ``cross=True`` of the decoder: (X [B, S, D], Y [B, T, D]) -> (X, moved Y)."""

    def forward(self, state: Pair, lengths: torch.Tensor | None = None) -> Pair:  # type: ignore[override]
        """One step; ``lengths``: [B] tokens of X without padding."""
        x, y = as_pair(state)
        return x, super().forward(y, memory=x, memory_lengths=lengths)


class EncoderDecoder(nn.Module):
    """The blocks of an encoder, then those of a decoder, with stacked parameters: (X, Y) -> (X, Y).

    ::

        stack = EncoderDecoder(
            BlockStack(6, 512, 8, attention="full"), BlockStack(6, 512, 8, attention="causal", cross=True)
        )
        memory, states = stack((embedded_source, embedded_target), lengths)

    Layers are numbered through: the keys of ``state_dict`` are those of an ``nn.ModuleList`` of
    :class:`EncoderBlock` and :class:`DecoderBlock`, with which it shares checkpoints. As the ``layers`` of
    :class:`mlpint.LayerParallel` the blocks of all intervals of a rank are evaluated in one go, those of either kind.

    Args:
        encoder, decoder: stacks of the same width, with ``cross`` in the decoder alone; owned from now on.

    Raises:
        ValueError: they do not fit together.
    """

    def __init__(self, encoder: BlockStack, decoder: BlockStack) -> None:
        super().__init__()
        if encoder.settings.cross or not decoder.settings.cross:
            raise ValueError("the decoder's blocks must have cross = True, and the encoder's must not")
        if encoder.settings.dim != decoder.settings.dim:
            raise ValueError(
                f"encoder of dim {encoder.settings.dim}, decoder of dim {decoder.settings.dim}: alike only"
            )
        if len(encoder.settings.window_pattern) > 1 or len(decoder.settings.window_pattern) > 1:
            raise ValueError("window: the layers of an encoder, and of a decoder, must have one in common")
        decoder.indices = tuple(len(encoder) + i for i in range(len(decoder)))
        self._own(encoder, decoder, len(encoder))

    def _own(self, encoder: BlockStack, decoder: BlockStack, encoder_layers: int) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.encoder_layers = encoder_layers  # of the whole network, of which some may be elsewhere
        for part in self.parts:
            part.saved_by_owner = True

    @classmethod
    def from_blocks(cls, blocks: Iterable[Block]) -> EncoderDecoder:
        """A stack with the weights of encoder blocks, followed by decoder blocks; copied.

        Raises:
            ValueError: those of a kind differ in settings, dtype, or in which parameters require gradients.
        """
        blocks = list(blocks)
        count = sum(isinstance(block, EncoderBlock) for block in blocks)
        first, last = blocks[:count], blocks[count:]
        if not all(isinstance(b, EncoderBlock) for b in first) or not all(isinstance(b, DecoderBlock) for b in last):
            kinds = ", ".join(type(block).__name__ for block in blocks)
            raise ValueError(f"from_blocks got {kinds}: must be EncoderBlocks and then DecoderBlocks")
        return cls(BlockStack.from_blocks(first), BlockStack.from_blocks(last))

    def to_blocks(self) -> nn.ModuleList:
        """The blocks with copies of their weights, and of their gradients where there are any."""
        return nn.ModuleList([*self.encoder.to_blocks(EncoderBlock), *self.decoder.to_blocks(DecoderBlock)])

    def select(self, indices: Sequence[int]) -> EncoderDecoder:
        """Copies of some of the layers, which keep their numbers."""
        part = type(self).__new__(type(self))
        nn.Module.__init__(part)
        wanted = set(indices)
        chosen = [[i for i, n in enumerate(own.indices) if n in wanted] for own in self.parts]
        part._own(self.encoder.select(chosen[0]), self.decoder.select(chosen[1]), self.encoder_layers)
        return part.train(self.training)

    @property
    def parts(self) -> tuple[BlockStack, BlockStack]:
        """Encoder and decoder."""
        return self.encoder, self.decoder

    def __len__(self) -> int:
        return len(self.encoder) + len(self.decoder)

    def forward(self, state: Pair, lengths: torch.Tensor | None = None) -> Pair:
        """All layers one after the other.

        Args:
            state: the encoder's input X [B, S, D] and the decoder's Y [B, T, D].
            lengths: [B] integers: tokens of X without the padding at its end. None: all.
        """
        x, y = as_pair(state)
        x = self.encoder.forward_in_turn(x, BatchArguments(lengths), self._keys(self.encoder))
        arguments = BatchArguments(memory_lengths=lengths)
        return x, self.decoder.forward_in_turn(y, arguments, self._keys(self.decoder), memory=x)

    @staticmethod
    def _keys(part: BlockStack) -> list[int] | None:
        return [draw_key() for _ in range(len(part))] if part.drops else None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for part in self.parts:
            part.save_rows(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        known = set()
        for part in self.parts:
            part.load_rows(state_dict, prefix, missing, errors)
            known |= {f"{prefix}{n}.{name}" for n in part.indices for name in part.row_names}
        unexpected.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
