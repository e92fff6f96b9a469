"""What would go wrong silently with replicas: the same data for all of them, gradients that nobody averages."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from ..comm.communicator import Comm
from ..state import version

_LOOKS = 3
_SAME = 1e-9  # relative difference of norms that unlike hardware may make; a step of one's own makes a larger one


class ReplicaWatch:
    """Compares the replicas of a mesh in the first training pass and in the first ones after a change of the weights.

    Args:
        data: the ranks with the same layers, one in each replica.
    """

    def __init__(self, data: Comm) -> None:
        self._data, self._looks = data, 0
        self._versions: list[int] | None = None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to compare."""
        return self._data.size == 1 or self._looks == _LOOKS

    def look(self, given: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
        """Before a training pass, unless it is over. Collective over the replicas where there is something to compare.

        Args:
            given: the state before the stack and the layers' arguments.
            weights: this rank's.

        Raises:
            RuntimeError: on all replicas; they are given the same data, or their weights differ.
        """
        versions = [version(w) for w in weights]
        if versions == self._versions:
            return
        self._versions, self._looks = versions, self._looks + 1
        own = [_norms(given), _norms(weights)]
        everyone = [json.loads(message) for message in self._data.gather(json.dumps(own).encode())]
        data, values = zip(*everyone, strict=True)
        if any(data[0]) and all(norms == data[0] for norms in data):
            raise RuntimeError(
                f"the {self._data.size} replicas of the mesh are given the same data, and would do the same work: take "
                "every comm.data.size-th batch from number comm.data.rank on (DistributedSampler(num_replicas="
                "comm.data.size, rank=comm.data.rank))"
            )
        if any(not _close(norms, values[0]) for norms in values):
            raise RuntimeError(
                "the replicas of the mesh hold unlike weights: call mlpint.average_gradients(model) on every rank "
                "between the backward and the optimiser's step, and start from the same weights"
            )


def _norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    floating = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    return [float(n) for n in torch._foreach_norm(floating, 2, dtype=torch.float64)] if floating else []


def _close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= _SAME * abs(y) for x, y in zip(a, b, strict=True))
