"""What is timed: an operation as one layer in plain PyTorch, as J layers in batched PyTorch, and as mlpint's kernel.

The plain form is written here from torch.nn.functional and differentiated by autograd. It is the eager baseline, what
torch.compile is given, and in float64 the reference for everybody's accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .shapes import Shape
from .timing import Call

Tensors = tuple[torch.Tensor, ...]
Inputs = dict[str, Any]
FORWARD, BACKWARD, FULL = "forward", "backward", "full"


@dataclass(frozen=True)
class Key:
    """What dispatch is asked with for one case and shape."""

    op: str
    d: int
    m: int
    j: int


class Case:
    """What is timed.

    Its inputs are dictionaries of tensors [J, ...]; other values in them are the same for all layers.

    Attributes:
        name: the case's own name.
        modes: modes that it can be timed in.
        masked: whether the mask matters.
        wanted: names of the inputs that a backward gives gradients for.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = (FORWARD,)
    masked: ClassVar[bool] = False
    wanted: ClassVar[tuple[str, ...]] = ()

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        """Random inputs; parameters are strided views of stacked storage, as the solver hands them out."""
        raise NotImplementedError

    def plain(self, layer_inputs: Inputs) -> Tensors:
        """One layer; differentiable."""
        raise NotImplementedError

    def batched(self, inputs: Inputs, mode: str) -> Call:
        """J layers in batched plain PyTorch: a call that returns what ``plain`` does, with J in front."""
        raise NotImplementedError

    def kernel(self, inputs: Inputs, mode: str) -> Call:
        """J layers in mlpint's Triton kernels."""
        raise NotImplementedError

    def finished(self, grads: Tensors, layer_inputs: Inputs) -> Tensors:
        """What the case makes of the gradients that autograd finds for ``wanted``."""
        return grads

    def comparable(self, results: Tensors, inputs: Inputs) -> Tensors:
        """The part of the results that is defined."""
        return results

    def flops(self, shape: Shape, mode: str) -> float:
        raise NotImplementedError


class Operation(Case):
    """A case that is one operation of dispatch's, with a kernel to be tuned.

    Attributes:
        op: operation that the kernel asks dispatch for.
    """

    op: ClassVar[str]

    def key(self, shape: Shape, mode: str) -> Key:
        """What the kernel asks dispatch with."""
        return Key(self.op, shape.d, shape.m, shape.j)

    def configs(self, shape: Shape, mode: str) -> list[dict[str, int]]:
        """Launch configurations that are worth trying."""
        raise NotImplementedError


def tensors(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """All tensors of the inputs, lists of them included."""
    flat: list[torch.Tensor] = []
    for value in inputs.values():
        flat += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, torch.Tensor)]
    return flat


def layer_of(inputs: Inputs, n: int) -> Inputs:
    """The inputs of one layer."""
    return {k: [t[n] for t in v] if isinstance(v, list) else v[n] if _stacked(v) else v for k, v in inputs.items()}


def _stacked(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def widened(inputs: Inputs) -> Inputs:
    """The same values in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(v) for v in value]
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: wide(value) for name, value in inputs.items()}


def differentiated(case: Case, function: Callable[[Inputs], Tensors], layer_inputs: Inputs, mode: str) -> Call:
    """The backward, or forward and backward, of the plain form of one layer; its input "grad" is the cotangent."""
    layer_inputs = {k: v.detach().requires_grad_() if k in case.wanted else v for k, v in layer_inputs.items()}
    leaves = [layer_inputs[name] for name in case.wanted]

    def backward(outputs: Tensors, retain: bool) -> Tensors:
        grads = torch.autograd.grad(outputs[0], leaves, layer_inputs["grad"], retain_graph=retain)
        return case.finished(grads, layer_inputs)

    if mode == FULL:
        return lambda: backward(function(layer_inputs), False)
    outputs = function(layer_inputs)
    return lambda: backward(outputs, True)


class Random:
    """Inputs of a case, always the same for a shape."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(shape.d + shape.m)

    def normal(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        """[J, *size]"""
        x = torch.randn(self.shape.j, *size, generator=self._generator, device=self.device)
        return (x * scale).to(self.shape.dtype)

    def parameter(self, *size: int, scale: float, shift: float = 0.0) -> torch.Tensor:
        """[J, *size], every second layer of a stack."""
        x = torch.randn(2 * self.shape.j, *size, generator=self._generator, device=self.device) * scale + shift
        return x.to(self.shape.dtype)[::2]

    def norm(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a LayerNorm."""
        return self.parameter(width, scale=0.1, shift=1.0), self.parameter(width, scale=0.1)

    def linear(self, out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [J, out, width] and bias of a linear map that keeps the scale of its input."""
        return self.parameter(out, width, scale=width**-0.5), self.parameter(out, scale=0.1)

    def lengths(self) -> torch.Tensor:
        """Key lengths [J, B], from half the sequence on, the same in all layers; int32."""
        t = self.shape.sequence
        size = (self.shape.batch,)
        lengths = torch.randint((t + 1) // 2, t + 1, size, generator=self._generator, device=self.device)
        return lengths.to(torch.int32).expand(self.shape.j, -1).contiguous()
