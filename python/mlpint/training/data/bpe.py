"""Byte-pair encoding of both languages of a parallel text in one vocabulary (Sennrich et al., 2016)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, START, END = range(3)
SPECIAL = 3
SMALLEST = 256 + SPECIAL  # every byte is a token, so that no text is beyond the vocabulary


class BytePairs:
    """Text as tokens and back, without loss but for spaces at the ends. Tokens below ``SPECIAL`` stand for no text.

    Args:
        saved: what :attr:`saved` was.
    """

    def __init__(self, saved: bytes) -> None:
        from tokenizers import Tokenizer

        self.saved = saved
        self._tokenizer: Tokenizer = Tokenizer.from_str(saved.decode())
        # Text that happens to look like a special token is text: the special ones lie outside the tokenizer.
        self.vocabulary = SPECIAL + self._tokenizer.get_vocab_size()

    @classmethod
    def learn(cls, lines: Iterable[str], vocabulary: int) -> BytePairs:
        """Merges the commonest pairs until there are ``vocabulary`` tokens, at least ``SMALLEST``, or no pair is left
        that occurs twice."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary - SPECIAL,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer.to_str().encode())

    def encode(self, lines: list[str]) -> list[list[int]]:
        """Tokens of each line, its end token last."""
        return [[i + SPECIAL for i in encoding.ids] + [END] for encoding in self._tokenizer.encode_batch(lines)]

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode([t - SPECIAL for t in tokens if t >= SPECIAL]).strip()
