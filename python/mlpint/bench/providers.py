"""Who computes a case: plain PyTorch in three ways, batched PyTorch, and mlpint's kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._functorch import config as functorch_config

from ..kernels import dispatch
from ..kernels.dispatch import Choice
from .cases import FORWARD, Case, Inputs, Operation, Tensors, differentiated, layer_of, tensors
from .shapes import Shape
from .timing import Call

EAGER, COMPILE, COMPILE_GRAPH, BADDBMM, OURS, TRITON = (
    "eager",
    "compile",
    "compile_graph",
    "baddbmm",
    "ours",
    "triton",
)
ALL = {
    EAGER: "J calls of plain PyTorch",
    COMPILE: "torch.compile of these",
    COMPILE_GRAPH: "that, replayed as a CUDA graph",
    BADDBMM: "mlpint.nn's batched plain PyTorch",
    OURS: "mlpint, by the path that dispatch chooses",
    TRITON: "mlpint's kernels, whatever dispatch says",
}
DEFAULT = (EAGER, COMPILE, COMPILE_GRAPH, BADDBMM, OURS)


def left_out(provider: str, device: torch.device) -> str | None:
    """Why a provider cannot run on a device; None if it can."""
    if device.type == "cuda":
        return None if provider != TRITON or dispatch.triton_is_installed() else "Triton is not installed"
    if provider == COMPILE_GRAPH:
        return "CUDA graphs need a GPU"
    if provider == OURS:
        return "without a GPU mlpint takes its torch path, which is baddbmm"
    if provider == TRITON and not _interpreting():
        return "Triton kernels need a GPU, or TRITON_INTERPRET=1"
    return None


def _interpreting() -> bool:
    if not dispatch.triton_is_installed():
        return False
    import triton

    return triton.knobs.runtime.interpret


def make(provider: str, case: Case, shape: Shape, inputs: Inputs, mode: str) -> Call:
    """The call of a provider; see :func:`joined` for its results."""
    if provider in (EAGER, COMPILE, COMPILE_GRAPH):
        return looped(case, inputs, mode, compiled=provider != EAGER)
    if provider == OURS:
        kernel = takes_kernel(case, shape, tensors(inputs)[0].device, mode)
        return case.kernel(inputs, mode) if kernel else case.batched(inputs, mode)
    build, path = (case.batched, "torch") if provider == BADDBMM else (case.kernel, "triton")
    with taking(path):
        inner = build(inputs, mode)

    def call() -> object:
        with taking(path):
            return inner()

    return call


def taking(path: str) -> AbstractContextManager[None]:
    """Inside, all operations take this path, kernels with their default configurations."""
    return dispatch.forced({op: Choice(path, None, "the benchmark says so") for op in dispatch.OPERATIONS})


def takes_kernel(case: Case, shape: Shape, device: torch.device, mode: str) -> bool:
    """Whether dispatch chooses the Triton kernel; true for a block, whose operations ask for themselves."""
    if not isinstance(case, Operation):
        return True
    key = case.key(shape, mode)
    choice = dispatch.choose(key.op, d=key.d, m=key.m, j=key.j, dtype=shape.dtype, device=device)
    return choice.path == "triton"


def looped(case: Case, inputs: Inputs, mode: str, compiled: bool = False) -> Call:
    """J calls of the plain form, one a layer."""
    count = len(tensors(inputs)[0])
    function = torch.compile(case.plain, dynamic=False) if compiled else case.plain
    layers = [layer_of(inputs, n) for n in range(count)]
    if mode == FORWARD:

        def call() -> list[Tensors]:
            with torch.no_grad():
                return [function(layer) for layer in layers]

        return call
    # Timing a compiled backward alone runs it again and again on what one forward has saved.
    with functorch_config.patch(donated_buffer=False) if compiled else nullcontext():
        calls = [differentiated(case, function, layer, mode) for layer in layers]
        if compiled:
            for each in calls:
                each()
    return lambda: [each() for each in calls]


def joined(results: object) -> Tensors:
    """The results of a call: J tuples stacked, or a tuple of tensors [J, ...] as it is."""
    if isinstance(results, list):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    assert isinstance(results, tuple)
    return results
