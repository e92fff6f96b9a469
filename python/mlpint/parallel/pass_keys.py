"""Which random numbers belong to which pass through a stack."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from ..mgrit import vectors
from ..state import State

Key = tuple[int, int]  # step, microbatch

# Counted passes use microbatches that no training loop reaches, so that the kinds of key never meet; from these on one
# for each replica of a mesh, which drop out other units.
_COUNTED = 1 << 40
_EVALUATION = 1 << 41


class PassKeys:
    """Counts the passes through a stack and gives each its key.

    Args:
        replica: of the mesh.

    Attributes:
        passes: how many there were in training mode, those apart that repeated earlier ones. Evaluation in between
            does not change which random numbers training draws.
        number: how many there were in any mode, those apart that repeated earlier ones.
        recent: the keys of the latest.
    """

    def __init__(self, replica: int = 0) -> None:
        self.replica = replica
        self.passes = self.number = 0
        self.recent: deque[Key] = deque(maxlen=64)
        self._chosen: Key | None = None

    def choose(self, step: int, microbatch: int) -> None:
        """Gives the next pass a key of the caller's."""
        self._chosen = step, microbatch

    def next(self, repeated: Iterator[Key] | None, training: bool) -> tuple[int, Key]:
        """The number of the pass that begins, and its key.

        repeated: keys of earlier passes, the next of which this pass repeats.
        """
        if repeated is None:
            self.number += 1
            self.passes += training
            kind = (self.passes, _COUNTED) if training else (self.number, _EVALUATION)
            key = kind[0], kind[1] + self.replica
        else:
            key = next(repeated)
        key, self._chosen = self._chosen or key, None
        if repeated is None:
            self.recent.append(key)
        return self.number, key


class CheckpointedPasses:
    """Finds the key of a pass that ``torch.utils.checkpoint`` around the stack runs again during the backward.

    Passes that may be run again are those under no_grad (the reentrant kind runs the first time so) and those where
    the hooks of the other kind are in force. They are told apart by their state and by torch's generator, which a
    checkpoint puts back; of several that are alike, a backward repeats the latest first.
    """

    def __init__(self) -> None:
        self._passes: deque[_CheckpointedPass] = deque(maxlen=64)

    def note(self, state: Sequence[torch.Tensor], key: Key) -> None:
        """Called for every pass that is no repetition."""
        if not torch.is_grad_enabled() or in_checkpoint():
            self._passes.append(_CheckpointedPass(state, key))

    def repeated_key(self, state: Sequence[torch.Tensor]) -> Key:
        """The key of the pass that is run again in the backward at work.

        Raises:
            RuntimeError: there was no such pass.
        """
        again = _CheckpointedPass(state, (0, 0))
        task = torch._C._current_graph_task_id()
        candidates = [p for p in reversed(self._passes) if p.norm == again.norm and p.repeated_in != task]
        candidates = [p for p in candidates if p.generator == again.generator] or candidates
        if not candidates:
            raise RuntimeError(
                "a LayerParallel stack is called during a backward with a state that it has not been called with "
                "before: in torch.utils.checkpoint around a stack everything before the stack must be computed again "
                "as it was (preserve_rng_state=True); or leave the stack out of it, which has recompute=True"
            )
        candidates[0].repeated_in = task
        return candidates[0].key


class _CheckpointedPass:
    def __init__(self, state: Sequence[torch.Tensor], key: Key) -> None:
        self.key = key
        self.norm = repr(math.sqrt(vectors.squared_norm(State(t.detach() for t in state))))
        self.generator = hash(torch.get_rng_state().numpy().tobytes())
        self.repeated_in = -1  # the backward in which the pass was run again


def in_backward() -> bool:
    """Whether autograd is at work on this thread."""
    return torch._C._current_graph_task_id() != -1


def in_checkpoint() -> bool:
    """Whether what autograd saves goes to ``torch.utils.checkpoint`` (the kind that is not reentrant)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
