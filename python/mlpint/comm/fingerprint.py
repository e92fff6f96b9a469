"""What a stack is made of, in a form that ranks can compare."""

from __future__ import annotations

import hashlib
import zlib

from torch import nn


def fingerprint(layers: list[nn.Module]) -> str:
    """A digest of the names, shapes and dtypes of all parameters and buffers."""
    text = "\n".join(
        f"{n} {name} {tuple(t.shape)} {t.dtype}"
        for n, layer in enumerate(layers)
        for name, t in [*layer.named_parameters(), *layer.named_buffers()]
    )
    return (
        f"{sum(p.numel() for layer in layers for p in layer.parameters())} parameters, digest "
        + (hashlib.sha256(text.encode()).hexdigest()[:8])
    )


def crc(*parts: bytes) -> str:
    """A digest of data, quick to take: for telling ranks or runs that read other data, not for finding damage."""
    digest = 0
    for part in parts:
        digest = zlib.crc32(part, digest)
    return f"{digest:08x}"
