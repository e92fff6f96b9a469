"""How many slices a batch goes through the ranks in, by measurement."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from ..comm.communicator import Comm
from ..layers.batch_slices import BatchSlices
from ..state import State

_REPETITIONS = 3  # the least time of so many is taken


def fastest_slices(comm: Comm, batch: State, run_first: Callable[[BatchSlices], None]) -> int:
    """The m for which a chain through P ranks is over soonest: P + m - 1 turns, each a slice's layers and a message.

    Small slices fill the ranks better, but layers are less efficient on them and each costs a message. Collective, with
    the same result everywhere; the time is that of the slowest rank.

    Args:
        batch: example state.
        run_first: evaluates what a rank does in the chain for the first of the slices.
    """
    samples = batch.tensors[0].shape[0]
    counts = [m for m in (1, 2, 4, 8, 16, 32) if m <= samples]
    own = []
    for m in counts:
        slices = BatchSlices(samples, m)

        def turn(slices: BatchSlices = slices) -> None:
            run_first(slices)
            for tensor in slices.slice(batch, 0).tensors:
                comm.broadcast(tensor.clone())

        own.append(_seconds(turn, batch.tensors[0].device))
    everyone = [json.loads(message) for message in comm.gather(json.dumps(own).encode())]
    slowest = [max(times) for times in zip(*everyone, strict=True)]
    return min(zip(counts, slowest, strict=True), key=lambda pair: (comm.size + pair[0] - 1) * pair[1])[0]


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(1 + _REPETITIONS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
