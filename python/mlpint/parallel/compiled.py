"""Getting on with torch.compile, without importing it: that takes as long as importing torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType

from torch._C._dynamo import eval_frame


def not_compiled(function: FunctionType) -> FunctionType:
    """As ``torch.compiler.disable``: a compiled model breaks its graph here, and nothing inside is compiled."""
    function._torchdynamo_disable = function._torchdynamo_disable_recursive = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "a LayerParallel stack solves with other ranks"  # type: ignore[attr-defined]
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    eval_frame.set_code_exec_strategy(function.__code__, skip)
    return function


@contextmanager
def graphs_kept() -> Iterator[None]:
    """Compiled layers keep what their graphs have saved, because a stack goes through a graph several times."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    from torch._functorch import config

    before, config.donated_buffer = config.donated_buffer, False
    try:
        yield
    finally:
        config.donated_buffer = before
