"""What a pass notices of uses that would make its numbers wrong: refused on all ranks, or warned of once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..layers.batch_slices import Tensors, mixes_samples
from ..layers.side_effects import BufferWatch, host_generators
from ..mgrit import vectors
from ..state import State
from .conditions import PassSetup
from .out_of_step import in_step

POOR_GRADIENTS = "poor gradients"
_PASSES_IN_GOOD_FAITH = 10  # of training, before a word on gradients that nobody looks at
_CHECKED_PASSES = 3  # that compare what the ranks were given
_SAME = 1e-3  # relative difference that unlike hardware may make


def check_replicas(setup: PassSetup, what: str, state: State) -> None:
    """Compares what has to be alike on all ranks, by two numbers, in the first passes.

    Raises:
        RuntimeError: on all ranks; it differs by more than rounding.
    """
    if setup.comm.size == 1 or setup.number > _CHECKED_PASSES:
        return
    mine = f"{math.sqrt(vectors.squared_norm(state))!r} {_projection(state)!r}"
    pairs = [tuple(map(float, message.split())) for message in setup.comm.gather(mine.encode())]
    largest = _SAME * abs(pairs[0][0])
    if any(abs(n - pairs[0][0]) > largest or abs(p - pairs[0][1]) > largest for n, p in pairs):
        seen = ", ".join(f"{n:.6g} (along one direction {p:.4g}) on rank {rank}" for rank, (n, p) in enumerate(pairs))
        raise RuntimeError(
            f"{what} differs from rank to rank: its norm is {seen}. Every rank must run the same batch through the "
            "same weights: seed all ranks alike before the model is made and the data is shuffled, or call "
            "mlpint.sync_replicas(model, comm) and give all ranks the data of one"
        )


def _projection(state: State) -> float:
    """Its part along a fixed random direction: other batches of a wide model have nearly the same norm."""
    total, generator = 0.0, torch.Generator().manual_seed(0)
    for tensor in state.tensors:
        if tensor.is_floating_point() and tensor.numel():
            rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
            # A direction for rows and one for columns, which need no memory of the size of the state.
            a, b = (
                torch.randn(n, generator=generator, dtype=torch.float32, device="cpu").to(rows.device)
                for n in rows.shape
            )
            total += float(torch.dot(torch.mv(rows.float(), b), a))
    return total


def check_ties(setup: PassSetup) -> None:
    """Refuses parameters that the model uses outside the stack as well, in the first pass that records.

    Raises:
        ValueError: on all ranks; they would get a part of their gradient alone, and drift.
    """
    if setup.comm.size == 1 or "ties" in setup.done:
        return
    setup.done.add("ties")
    names = [
        n for m in setup.comm.gather("\n".join(setup.tied_outside()).encode()) for n in m.decode().split("\n") if n
    ]
    if names:
        raise ValueError(
            f"parameters of a LayerParallel stack are used outside it too: {', '.join(dict.fromkeys(names))}. Most "
            "ranks would miss a part of their gradients; untie them before the stack is made"
        )


def warn_of_poor_gradients(setup: PassSetup) -> None:
    """Warns once of training with few iterations that neither error control nor the consistency term looks after."""
    options = setup.conditions.options
    looked_after = options.exact or setup.conditions.consistency or POOR_GRADIENTS in setup.done
    if looked_after or not setup.training or setup.number < _PASSES_IN_GOOD_FAITH:
        return
    setup.done.add(POOR_GRADIENTS)
    if setup.comm.world.rank == 0:
        warnings.warn(
            f"gradients of {options} are approximations, and nothing looks after them: training may diverge, without a "
            "sign in the first steps. Let mlpint.ErrorControl(stack) measure them, or keep the coarse model true with "
            "LayerParallel(..., consistency=1.0)",
            stacklevel=2,
        )


def check_samples(setup: PassSetup, state: State, run: Callable[[Tensors], Tensors]) -> None:
    """Refuses layers that mix the samples of a batch which is cut, in the first such pass of training and evaluation.

    Args:
        state: before the stack.
        run: takes it through this rank's layers, each time with the same random numbers.

    Raises:
        ValueError: on all ranks; slices would change the result.
    """
    check = f"samples are independent, training {setup.training}"
    if check in setup.done:
        return
    setup.done.add(check)
    with in_step(setup.comm):
        mixed = mixes_samples(run, tuple(state.tensors))
    ranks = [r for r, message in enumerate(setup.comm.gather(b"1" if mixed else b"")) if message]
    if ranks:
        raise ValueError(
            f"chain_slices or serial_microbatches cuts the batch, and layers of rank {ranks[0]} mix its samples (batch "
            "statistics, routing by capacity): what they make of one depends on the others, so that slices would "
            "change the result. Set both to 1"
        )


@contextmanager
def watched_buffers(setup: PassSetup, evaluators: int) -> Iterator[None]:
    """Warns once of buffers that layers move where they are evaluated several times."""
    several = not setup.conditions.options.exact or setup.conditions.recompute or evaluators > 1
    if not several or "buffers" in setup.done:
        yield
        return
    watch = BufferWatch(setup.conditions.store.modules)
    yield
    moved = watch.moved()
    if moved:
        setup.done.add("buffers")
        layer, _, name = moved.partition(".")
        warnings.warn(
            f"layer {layer} moves its buffer {name} whenever it is evaluated (batch normalisation, spectral "
            "norm), and a LayerParallel stack that is not exact, recomputes or takes microbatches evaluates a "
            "layer several times a pass: its statistics, and so its results, differ from those of the plain loop",
            stacklevel=2,
        )


@contextmanager
def watched_generators(setup: PassSetup) -> Iterator[None]:
    """Warns once of layers that draw from generators that belong to no layer."""
    if not setup.training or "generators" in setup.done:
        yield
        return
    before = host_generators()
    yield
    if host_generators() != before:
        setup.done.add("generators")
        warnings.warn(
            "a layer draws random numbers from Python's random or NumPy: they differ between a layer's evaluations "
            "and from rank to rank. Let it draw from torch, whose generator a stack seeds for each layer",
            stacklevel=2,
        )
