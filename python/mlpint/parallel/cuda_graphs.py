"""CUDA graphs of a stack: its forward solve and its adjoint, captured once and replayed for one shape.

Small layers are bound by what the host spends on each launch: the C++ solver calls Python for every step, and Python
calls torch. A replay spends that once for the whole solve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from ..layers.random_keys import LayerRandom
from ..mgrit.learnt_operators import LEARNT
from .layer_parallel import LayerParallel

Gradients = tuple[torch.Tensor | None, ...]
Outputs = TypeVar("Outputs", bound=Gradients)
_WARM_UP = 3  # calls before a capture, in which libraries, kernels and autograd set themselves up


class Graph(Protocol[Outputs]):
    """Work on tensors that stay where they are, recorded.

    Attributes:
        outputs: the tensors that every replay writes its results to.
    """

    outputs: Outputs

    def replay(self) -> None: ...


class Recorder(Protocol):
    """What makes graphs."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Does the work a few times, as it will be recorded."""

    def record(self, work: Callable[[], Outputs]) -> Graph[Outputs]:
        """Does the work once, recording it."""


class _CudaGraph(Generic[Outputs]):
    def __init__(self, work: Callable[[], Outputs], stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, pool=pool):
            self.outputs = work()

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """CUDA graphs that share a memory pool, captured on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def record(self, work: Callable[[], Outputs]) -> Graph[Outputs]:
        return _CudaGraph(work, self._stream, self._pool)


class Captured:
    """A stack whose forward pass and backward pass are replayed; called like the stack. See :func:`capture`."""

    _result: torch.Tensor  # of the forward pass done last, with its graph of autograd, until the backward pass

    def __init__(
        self, stack: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict[str, Any], recorder: Recorder | None
    ) -> None:
        _check(stack, x, (args, kwargs), recorder)
        self._stack = stack
        leaves, self._structure = pytree.tree_flatten(((x, *args), kwargs))
        # Replays read the inputs where the capture found them.
        self._inputs = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in leaves]
        self._inputs[0].requires_grad_(x.is_floating_point() and torch.is_grad_enabled())
        self._weights = tuple(p for p in stack.parameters() if p.requires_grad and torch.is_grad_enabled())
        self._made_for = self._conditions()
        self._wanted = tuple(t for t in (self._inputs[0], *self._weights) if t.requires_grad)
        self._pass = 0
        recorder = CudaRecorder(x.device) if recorder is None else recorder
        generators = _generators(x.device)
        recorder.warm_up(self._both)
        drawing = _drawing(stack, generators, x.device)
        if drawing:
            raise ValueError(
                f"capture: {drawing} draw random numbers (dropout), and every replay would draw the same; "
                "set dropout to 0 or call eval()"
            )
        with _without_generators(stack):
            self._forward = recorder.record(self._run_forward)
            self._grad = torch.zeros_like(self._forward.outputs[0])
            self._backward = recorder.record(self._run_backward) if self._wanted else None

    # --- the work that is recorded -----------------------------------------------------------------------------------

    def _run_forward(self) -> tuple[torch.Tensor]:
        (x, *args), kwargs = pytree.tree_unflatten(self._inputs, self._structure)
        with torch.set_grad_enabled(bool(self._wanted)):
            result = self._stack_forward(x, *args, **kwargs)
        if not isinstance(result, torch.Tensor):
            raise ValueError(f"capture: the stack returned a {type(result).__name__}, not one tensor")
        self._result = result
        return (result.detach(),)

    def _stack_forward(self, *args: Any, **kwargs: Any) -> Any:
        # The class's own: an installed capture stands in the instance.
        return type(self._stack).forward(self._stack, *args, **kwargs)

    def _run_backward(self) -> Gradients:
        result = self._result
        del self._result
        return torch.autograd.grad(result, self._wanted, self._grad, allow_unused=True)

    def _both(self) -> None:
        (y,) = self._run_forward()
        if self._wanted:
            self._grad = torch.zeros_like(y)
            self._run_backward()

    # --- the replay --------------------------------------------------------------------------------------------------

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The stack's result for inputs of the captured shapes.

        Raises:
            ValueError: inputs, options or parameters that are not those of the capture.
        """
        self._check_inputs(x, args, kwargs)
        if torch.is_grad_enabled() and self._wanted:
            return _Replay.apply(self, x, *self._weights)
        return self._replay_forward()

    def _replay_forward(self) -> torch.Tensor:
        self._pass += 1
        self._hand_over_gradients()
        self._forward.replay()
        return self._forward.outputs[0].clone()

    def _replay_backward(self, number: int, grad: torch.Tensor) -> list[torch.Tensor | None]:
        """Gradients for x and the weights."""
        if number != self._pass:
            raise RuntimeError(
                "backward through a captured stack after another forward pass, which has overwritten what was saved: "
                "call backward before the next forward pass, or call the stack without capture"
            )
        assert self._backward is not None, "autograd comes here only where x or a weight wants a gradient"
        self._pass += 1  # its states are used up
        self._grad.copy_(grad)
        outputs = iter(self._backward.outputs)
        dx, *gradients = [next(outputs) if t.requires_grad else None for t in (self._inputs[0], *self._weights)]
        self._hand_over_gradients()
        self._backward.replay()
        return [None if dx is None else dx.clone(), *(None if g is None else g.detach() for g in gradients)]

    def _hand_over_gradients(self) -> None:
        """Gives weights whose ``.grad`` lies where the backward wrote it memory of their own, before any replay.

        Autograd makes a first gradient the weight's own without a copy. The graphs share a memory pool, so the next
        forward pass may write its states there, and the next backward writes its gradient there.
        """
        if self._backward is None:
            return
        written = {t.data_ptr() for t in self._backward.outputs if t is not None}
        for weight in self._weights:
            if weight.grad is not None and weight.grad.data_ptr() in written:
                weight.grad = weight.grad.clone()

    def replay(self) -> None:
        """Both passes on what the inputs and the gradient held last, for timing."""
        self._pass += 1
        self._forward.replay()
        if self._backward is not None:
            self._backward.replay()

    # --- what it was made for ----------------------------------------------------------------------------------------

    def _conditions(self) -> dict[str, Any]:
        """All that a recording depends on, beside the inputs."""
        stack, kind = self._stack, self._inputs[0].device.type
        conditions: dict[str, Any] = {
            "training": stack.training,
            "autocast": (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            "places of the parameters": [p.data_ptr() for p in self._weights],
        }
        if isinstance(stack, LayerParallel):
            conditions["options"] = stack.options
            conditions["watch_residuals"] = stack.watch_residuals
        return conditions

    def _check_inputs(self, x: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        for name, now in self._conditions().items():
            if now != self._made_for[name]:
                changed = "" if name.startswith("places") else f" from {self._made_for[name]} to {now}"
                raise ValueError(f"the {name} of a captured stack changed{changed}: capture it anew")
        leaves, structure = pytree.tree_flatten(((x, *args), kwargs))
        if structure != self._structure:
            raise ValueError("the arguments are not as many, or not named as in the capture: capture anew")
        for number, (new, old) in enumerate(zip(leaves, self._inputs, strict=True)):
            if not isinstance(old, torch.Tensor):
                if new != old:
                    raise ValueError(f"argument {number} is {new!r}, captured with {old!r}: capture the stack anew")
            elif not isinstance(new, torch.Tensor) or (new.shape, new.dtype, new.device) != (
                old.shape, old.dtype, old.device
            ):  # fmt: skip
                raise ValueError(
                    f"argument {number} is {_kind_of(new)}, captured with {_kind_of(old)}: capture it anew"
                )
        with torch.no_grad():
            for new, old in zip(leaves, self._inputs, strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

    # --- in place of the stack ---------------------------------------------------------------------------------------

    def install(self) -> Captured:
        """Makes the stack itself replay when it is called, so that the model around it need not change."""
        self._stack.__dict__["forward"] = self
        return self

    def remove(self) -> None:
        """Makes the stack evaluate its layers again."""
        self._stack.__dict__.pop("forward", None)

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise TypeError("a captured stack cannot be copied: remove() the capture first")


class _Replay(torch.autograd.Function):
    """A replay as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, captured: Captured, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        result = captured._replay_forward()
        ctx.captured, ctx.number = captured, captured._pass
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *ctx.captured._replay_backward(ctx.number, grad))


def capture(stack: nn.Module, x: torch.Tensor, *args: Any, recorder: Recorder | None = None, **kwargs: Any) -> Captured:
    """Captures the forward pass and the backward pass of a stack as two CUDA graphs.

    ``captured = capture(blocks, x)``, then ``captured(x)`` in place of ``blocks(x)``; or ``captured.install()``, and
    ``blocks(x)`` itself replays until ``captured.remove()``. Results and gradients are those of the stack. A pass
    overwrites what the one before has saved: each forward pass is followed by its backward before the next one.
    Gradients that ``.grad`` holds at that time are moved out of the way; references to them from elsewhere are not.

    Args:
        stack: a :class:`mlpint.LayerParallel` of one rank, or any module whose work depends on shapes alone, such
            as the serial stack of the same layers.
        x: an example of the state, a tensor on a GPU. Its shape, dtype and device are those of every later call.
        *args, **kwargs: examples of the other arguments, positional or by keyword as in later calls. Tensors among
            them get no gradient; all else has to stay the same.

    Keyword args:
        recorder: what records; CUDA graphs by default.

    Raises:
        ValueError: what cannot be captured, with what to do instead: tensors on a CPU, several ranks, dropout, a
            tolerance or a watch of residuals, coarse operators that learn.
    """
    return Captured(stack, x, args, kwargs, recorder)


def _check(stack: nn.Module, x: torch.Tensor, others: Any, recorder: Recorder | None) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"capture: the state is a {type(x).__name__}; only a stack of one tensor can be captured")
    if getattr(stack, "consistency", 0):
        raise ValueError("capture: a stack with a consistency term cannot be captured; call the stack itself")
    if x.device.type != "cuda" and recorder is None:
        raise ValueError(f"capture: x is on the {x.device}, and CUDA graphs need a GPU; call the stack itself")
    if any(isinstance(t, torch.Tensor) and t.requires_grad for t in pytree.tree_leaves(others)):
        raise ValueError("capture: an argument requires a gradient; only x and parameters can, call the stack itself")
    if not isinstance(stack, LayerParallel):
        return
    o = stack.options
    why = None
    if stack.comm.size > 1:
        why = f"{stack.comm.size} ranks exchange states with each other, which a graph cannot; use one rank"
    elif o.tolerance > 0 and not o.exact:
        why = f"tolerance = {o.tolerance} decides by a norm on the host; set tolerance=0 and fix the iterations"
    elif stack.watch_residuals:
        why = "watch_residuals brings norms to the host; switch it off"
    elif o.coarse in LEARNT and not o.exact:
        why = f"coarse = {o.coarse!r} learns on the way; use injection, sum or identity"
    if why:
        raise ValueError(f"capture: {why}")


def _drawing(stack: nn.Module, before: Sequence[torch.Tensor], device: torch.device) -> str | None:
    """Who drew random numbers since the generators had these states; None if nobody did."""
    if isinstance(stack, LayerParallel):
        return stack.store.drawing(stack.layer_random)  # it puts the generators back
    if getattr(stack, "drops", False):
        return "the blocks"
    after = _generators(device)
    return "the stack" if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) else None


def _generators(device: torch.device) -> list[torch.Tensor]:
    """States of the generators that a module may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


class _NoGenerators(LayerRandom):
    """Leaves the generators alone, whose state cannot be read while a graph is captured; nobody draws."""

    @contextmanager
    def preserved(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def keyed(self, step: int, microbatch: int, layer: int, training: bool, device: torch.device) -> Iterator[None]:
        yield


@contextmanager
def _without_generators(stack: nn.Module) -> Iterator[None]:
    if not isinstance(stack, LayerParallel):
        yield
        return
    with stack.using(layer_random=_NoGenerators(stack.layer_random.seed)):
        yield


def _kind_of(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
