"""Getting on with torch.compile, without importing it: that takes as long as importing torch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As ``torch.compiler.disable``: a compiled model breaks its graph here, and nothing inside is compiled."""

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        return _without_compiler(function)(*args, **kwargs)

    plain._torchdynamo_disable = True  # type: ignore[attr-defined]
    torch._C._dynamo.eval_frame.skip_code(plain.__code__)
    return plain


@functools.cache
def _without_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


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
