"""What a stack is made of, in a form that ranks can compare."""

from __future__ import annotations

import hashlib

from torch import nn


def fingerprint(layers: list[nn.Module]) -> str:
    """A digest of the names, shapes and dtypes of all parameters and buffers."""
    text = "\n".join(
        f"{n} {name} {tuple(t.shape)} {t.dtype}"
        for n, layer in enumerate(layers)
        for name, t in [*layer.named_parameters(), *layer.named_buffers()]
    )
    return f"{sum(p.numel() for layer in layers for p in layer.parameters())} parameters, digest " + (
        hashlib.sha256(text.encode()).hexdigest()[:8]
    )
