"""Which path a shape takes and why, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .dispatch import OPERATIONS, Choice, choose


@dataclass(frozen=True)
class Explanation:
    """Choices by operation; shown as one line each.

    Attributes:
        choices: pairs of an operation with its part of the block, and the choice.
    """

    choices: tuple[tuple[str, Choice], ...]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.choices)
        return "\n".join(f"{name:<{width}}  {choice.path:<6}  {choice.why}" for name, choice in self.choices)

    __repr__ = __str__


def explain(
    what: Any,
    *,
    batch: int,
    sequence: int,
    d: int | None = None,
    j: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """Says which path an operation or a block takes for a shape, and why.

    Args:
        what: a name of :data:`mlpint.kernels.dispatch.OPERATIONS`, or a :class:`mlpint.nn.Block` or ``BlockStack``.

    Keyword args:
        batch, sequence: of one layer's input; M = batch x sequence.
        d: width of the operation's input in channels, for ``"attention"`` that of a head; a block knows its own.
        j: layers in one launch; for attention layers x batch x heads.
        dtype, device: those of the tensors; a block's own by default, else bfloat16 on the GPU if there is one.

    Raises:
        ValueError: an unknown operation, or one without d.
        TunedFileError: the file of tuned configurations cannot be used.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(what, str):
        if what not in OPERATIONS:
            raise ValueError(f"op = {what!r}: must be of {', '.join(OPERATIONS)}, or a block")
        if d is None:
            raise ValueError(f"explain({what!r}) needs d, the width of the operation's input")
        dtype, device = dtype or torch.bfloat16, device or here
        return Explanation(((what, choose(what, d=d, m=batch * sequence, j=j, dtype=dtype, device=device)),))
    settings = getattr(what, "settings", None)
    if settings is None:
        raise ValueError(f"explain takes an operation's name or an mlpint.nn.Block, not a {type(what).__name__}")
    parameter = next(what.parameters())
    dtype, device = dtype or parameter.dtype, device or parameter.device
    d, ffn, m = settings.dim, settings.ffn, batch * sequence
    head = max(16, 1 << (settings.head_width - 1).bit_length())
    heads = j * batch * settings.heads
    parts: tuple[tuple[str, str, int, int, int], ...] = (
        ("ln_linear", "QKV, FFN up", d, m, j),
        ("attention", "", head, sequence, heads),
        ("attention_backward", "", head, sequence, heads),
        ("linear_axpy", "projection", d, m, j),
        ("linear_axpy", "FFN down", ffn, m, j),
        ("mlp", "the whole FFN", d, m, j),
        ("ln_backward_add", "", d, m, j),
    )
    if settings.modern:
        before, after = settings.norm != "output", settings.norm != "pre"  # norms of a half's input, of what it adds
        own = settings.heads * settings.head_width
        there: dict[tuple[str, str, int, int, int], bool] = {
            ("ln_linear", "QKV" if settings.gated else "QKV, FFN up", d, m, j): before,
            ("pack_heads", "", settings.head_width, m, j): settings.qk_norm != "all" and settings.head_width % 2 == 0,
            ("attention", "", head, sequence, heads): True,
            ("attention_backward", "", head, sequence, heads): True,
            ("linear_axpy", "projection", own, m, j): not after,
            ("gated_linear", "", d, m, j): settings.gated and before,
            ("linear_axpy", "FFN down", ffn, m, j): not after,
            ("gated_backward", "", ffn, m, j): settings.gated,
            ("ln_backward_add", "", d, m, j): True,
        }
        parts = tuple(part for part, is_there in there.items() if is_there)
    return Explanation(
        tuple(
            (f"{op} ({part})" if part else op, choose(op, d=width, m=rows, j=layers, dtype=dtype, device=device))
            for op, part, width, rows, layers in parts
        )
    )
