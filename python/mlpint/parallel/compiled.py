"""Getting on with torch.compile, without importing it: that takes as long as importing torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Callable[..., Any])


def not_compiled(function: Function) -> Function:
    """As ``torch.compiler.disable``: a compiled model breaks its graph here, and nothing inside is compiled."""
    reason = "a LayerParallel stack solves with other ranks"
    vars(function).update(
        _torchdynamo_disable=True, _torchdynamo_disable_recursive=True, _torchdynamo_disable_msg=reason
    )
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
