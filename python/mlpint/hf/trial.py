"""A small pass before and after a model's stacks are replaced: whatever its loop does, both must agree."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..comm.communicator import Comm
from ..mgrit.options import MGRIT
from ..parallel.clip import stacks_of
from .families import pretrained_models

_EXACT = MGRIT(levels=1)
_BATCH, _LENGTH = 2, 12
# Largest relative difference that another order of sums may make; other dtypes are not compared.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}


class Trial:
    """The results of a model on a small batch, before its stacks are replaced.

    Models of the transformers library say themselves what they take; others are not tried.

    Args:
        model: the whole model, on every rank.
        comm: the ranks. Where their weights differ there is nothing to compare with.
        stacked: whether layers are to become blocks: text is tried with padding, too, and may differ in any dtype by
            the single precision in which the library has norms and positions.
    """

    def __init__(self, model: nn.Module, comm: Comm, stacked: bool = False) -> None:
        self.model, self.comm = model, comm
        self._rounding = _ROUNDING | ({torch.float64: 1e-5} if stacked else {})
        inputs = _inputs(model)
        self.inputs = [] if inputs is None else [inputs]
        if inputs is not None and "input_ids" in inputs and stacked:
            lengths = torch.arange(_LENGTH - 1, _LENGTH - 1 - _BATCH, -1)[:, None]
            mask = (torch.arange(_LENGTH) < lengths).long().to(inputs["input_ids"].device)
            self.inputs.append(inputs | {"attention_mask": mask})
        self.expected: list[torch.Tensor] | None = None
        if self.inputs and _same_on_all_ranks(model, comm):
            try:
                with _undisturbed(model):
                    self.expected = self._run()
            except Exception:  # it takes other inputs than it says: there is nothing to compare
                self.inputs = []

    def _run(self) -> list[torch.Tensor]:
        return [result for inputs in self.inputs for result in _results(self.model(**inputs))]

    def compare(self) -> None:
        """Runs the same batch through the replaced stacks, swept exactly. Collective.

        Raises:
            ValueError: on all ranks; the results differ, or what a stack refuses.
        """
        if self.expected is None:
            return
        with ExitStack() as exactly, _undisturbed(self.model):
            for _, stack in stacks_of(self.model):
                exactly.enter_context(stack.using(options=_EXACT, consistency=0.0, keys=itertools.repeat((0, 0))))
            results = self._run()
        worst = max(
            (_distance(a, b, self._rounding[b.dtype]) for a, b in zip(results, self.expected, strict=False)),
            default=0.0,
        )
        worst = max(float(message) for message in self.comm.gather(repr(worst).encode()))
        if worst > 1:
            raise ValueError(
                f"{type(self.model).__name__} computes something else with its layers in a layer-parallel stack, "
                "so its forward does more between the layers than to hand the state on; it cannot be parallelized so"
            )


def _inputs(model: nn.Module) -> dict[str, Any] | None:
    """A small batch for a model of the transformers library; None for others."""
    parts = pretrained_models(model)
    if "" not in parts:
        return None
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if not isinstance(size, int) or size > 512:
            return None
        dtype = next(p.dtype for p in model.parameters())
        return {name: torch.randn(_BATCH, channels, size, size, generator=generator).to(device, dtype)}
    words = getattr(config, "vocab_size", None)
    if name != "input_ids" or not isinstance(words, int) or words < 4:
        return None
    inputs = {name: torch.randint(3, words, (_BATCH, _LENGTH), generator=generator).to(device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs[name].clone()
    return inputs


def _same_on_all_ranks(model: nn.Module, comm: Comm) -> bool:
    total = sum(float(p.detach().double().sum()) for p in model.parameters() if p.is_floating_point() and not p.is_meta)
    return len(set(comm.gather(repr(total).encode()))) == 1


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model evaluates without gradients and caches; its modes and the random numbers are put back."""
    configs: list[Any] = [part.config for part in pretrained_models(model).values()]
    configs = [config for config in configs if getattr(config, "use_cache", False)]
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    for config in configs:
        config.use_cache = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for config in configs:
            config.use_cache = True
        for module in model.modules():
            module.training = modes.get(module, module.training)


def _results(output: Any) -> list[torch.Tensor]:
    values: Sequence[Any] = list(output.values()) if hasattr(output, "values") else pytree.tree_leaves(output)
    return [t for t in values if isinstance(t, torch.Tensor) and t.dtype in _ROUNDING]


def _distance(a: torch.Tensor, b: torch.Tensor, rounding: float) -> float:
    """In units of what rounding may make; NaNs are at the same places or infinitely far."""
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    finite = b.isfinite()
    a, b = a[finite].double(), b[finite].double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) / rounding if b.numel() else 0.0
