"""Which random numbers belong to which pass through a stack."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

Key = tuple[int, int]  # step, microbatch

# Counted passes use a microbatch that no training loop reaches, so that the two kinds of key never meet.
_COUNTED = 1 << 40


class PassKeys:
    """Counts the passes through a stack and gives each its key.

    Attributes:
        passes: how many there were, those apart that repeated earlier ones.
        recent: the keys of the latest.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.recent: deque[Key] = deque(maxlen=64)
        self._chosen: Key | None = None

    def choose(self, step: int, microbatch: int) -> None:
        """Gives the next pass a key of the caller's."""
        self._chosen = step, microbatch

    def next(self, repeated: Iterator[Key] | None) -> tuple[int, Key]:
        """The number of the pass that begins, and its key.

        repeated: keys of earlier passes, the next of which this pass repeats.
        """
        if repeated is None:
            self.passes += 1
        key = (self.passes, _COUNTED) if repeated is None else next(repeated)
        key, self._chosen = self._chosen or key, None
        if repeated is None:
            self.recent.append(key)
        return self.passes, key
