"""Going through the present batch once more, under other options, without leaving a trace."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..comm.communicator import Comm
from ..mgrit.options import MGRIT
from ..parallel.layer_parallel import LayerParallel


@dataclasses.dataclass
class Gradients:
    """The gradients of this rank's parameters on one batch, as some options give them.

    Attributes:
        by_layer: layer index -> gradients, one for each parameter that requires one and that no earlier layer has.
        convergence_factor: by direction, where it was watched; not a number where states are not.
    """

    by_layer: dict[int, tuple[torch.Tensor | None, ...]]
    convergence_factor: dict[str, float]


class Rehearsal:
    """Repeats the stack's passes of the present step.

    The layers draw the random numbers that they drew in the step, and what is drawn outside the stack is at least the
    same in every repetition. Afterwards the stack's options, statistics, counters and learnt coarse operators, all
    ``.grad`` and the state of the generators are as they were. Collective.

    Args:
        blocks: the stack.
        again: computes the step's loss again, as a scalar tensor to be differentiated.
        device: where the loss lies.
        passes: that ``again`` makes through the stack, if known; corrected otherwise.
    """

    def __init__(
        self, blocks: LayerParallel, again: Callable[[], torch.Tensor], device: torch.device, passes: int = 1
    ) -> None:
        self.blocks, self.again, self.device, self.passes = blocks, again, device, passes
        self._keys = list(blocks.pass_keys.recent)
        if not self._keys:
            raise ValueError("the stack has not been called yet: control.step comes after the forward and the backward")

    @contextmanager
    def under(self, options: MGRIT, *, watch: bool = False, learn: bool = False) -> Iterator[None]:
        """Inside, the stack's passes are repetitions under these options.

        watch: compute residual norms. learn: coarse operators learn from these passes as from any other.
        """
        blocks, last, stats = self.blocks, self._keys[-self.passes :], self.blocks.stats
        drawing = blocks.store.drawing(blocks.layer_random) if blocks.conditions.chain_slices != 1 else None
        if drawing:
            raise ValueError(
                f"chain_slices = {blocks.conditions.chain_slices!r}, and {drawing} draw random numbers: exact sweeps, "
                "which error control compares with, draw others. Set chain_slices to 1, or the dropout to 0"
            )
        self._used = 0

        def repeated() -> Iterator[tuple[int, int]]:
            for key in itertools.chain(last, itertools.repeat(last[-1])):
                self._used += 1
                yield key

        repetition = blocks.using(
            options=options,
            watch_residuals=watch,
            learning=learn,
            serial_microbatches=1,  # slices of a batch draw other random numbers than all of it
            chain_slices=1,
            consistency=0.0,  # it is the loss's gradient that is to be right
            keys=repeated(),
        )
        try:
            with repetition, blocks.layer_random.preserved(self.device):
                yield
        finally:
            blocks.stats = stats

    def gradients(self, options: MGRIT, *, watch: bool = False, learn: bool = False) -> Gradients:
        """The gradients that these options give."""
        weights = _own_weights(self.blocks)
        anchor = (self.blocks.anchor,) if self.blocks.anchor.requires_grad else ()
        inputs = (*anchor, *(p for ps in weights.values() for p in ps))
        with self.under(options, watch=watch, learn=learn), torch.enable_grad():
            loss = _checked(self.again())
            if not self._used:
                raise ValueError("`again` did not call the stack; it has to compute the step's loss again")
            if self._used == self.passes:
                # Not backward(): nobody's .grad changes, and nobody's hooks run.
                results = iter(torch.autograd.grad(loss, inputs, allow_unused=True)[len(anchor) :])
                norms = self.blocks.stats.residual_norms
                factors = _largest({d: _ratio(*r[-2:]) for d, r in norms.items() if len(r) > 1}, self.blocks.comm.data)
                gradients = {n: tuple(next(results) for _ in ps) for n, ps in weights.items()}
                return Gradients(self.blocks.store.by_layer(gradients), factors)
        self.passes = self._used  # only now is it known which keys were whose
        return self.gradients(options, watch=watch, learn=learn)


def _ratio(before: float, after: float) -> float:
    """To 6 digits: the last ones of a norm depend on the number of ranks, and decisions must not."""
    return float(f"{after / before:.6g}") if before else 0.0


def _largest(factors: dict[str, float], replicas: Comm) -> dict[str, float]:
    """Of all replicas; not a number where it is none on one of them."""
    if replicas.size == 1:
        return factors
    everyone = [json.loads(message) for message in replicas.gather(json.dumps(factors).encode())]
    return {d: max((f[d] for f in everyone), key=lambda f: math.inf if math.isnan(f) else f) for d in factors}


def _checked(loss: torch.Tensor) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            what = "a loss that nothing can be differentiated by"
        raise TypeError(f"`again` returned {what}; it has to return the loss, a scalar tensor, before its backward")
    return loss


def _own_weights(blocks: LayerParallel) -> dict[int, tuple[torch.nn.Parameter, ...]]:
    """Trainable parameters of this rank's layers, each counted once over all layers and ranks."""
    seen = {p for p, ranks in blocks.shared_parameters if ranks[0] != blocks.comm.rank}
    weights = {}
    for n, parameters in sorted(blocks.store.trainable_parameters().items()):
        weights[n] = tuple(p for p in parameters if p not in seen)
        seen.update(parameters)
    return weights


def gradient_agreement(a: Gradients, b: Gradients, blocks: LayerParallel) -> tuple[float, float]:
    """Cosine of two gradients and ||a - b|| / ||b||, over the parameters of all ranks and replicas. Collective.

    Added up layer by layer in the order of the layers: the same to the last bit on every rank, for any number of ranks.
    """
    sums = torch.zeros(len(blocks), 4, dtype=torch.float64, device="cpu")
    for n, ours in a.by_layer.items():
        for pair in zip(ours, b.by_layer[n], strict=True):
            present = next((g for g in pair if g is not None), None)
            if present is not None:
                p, q = ((torch.zeros_like(present) if g is None else g).double() for g in pair)
                products = (p * p).sum(), (q * q).sum(), (p * q).sum(), (p - q).square().sum()
                sums[n] += torch.stack(products).cpu()
    blocks.comm.sum_ordered([sums])
    blocks.comm.data.sum_ordered([sums])
    aa, bb, ab, dd = (sum(column) for column in sums.t().tolist())
    if aa == bb == 0:
        return 1.0, 0.0
    return ab / (math.sqrt(aa) * math.sqrt(bb)) if aa and bb else 0.0, math.sqrt(dd / bb) if bb else math.inf
