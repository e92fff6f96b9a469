"""What a stack is made of, in a form that ranks can compare."""

from __future__ import annotations

import hashlib
import zlib

import torch
from torch import nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def checksum(layers: list[nn.Module]) -> str:
    """A digest of the values of all parameters, which is the same on any device: their bytes as integers, added up."""
    sums: dict[torch.device, torch.Tensor] = {}
    for parameter in dict.fromkeys(p for layer in layers for p in layer.parameters()):
        if not parameter.is_meta:
            data = parameter.detach().contiguous().view(-1)
            total = data.view(_INTEGERS[data.element_size()]).sum(dtype=torch.int64)
            # A position's weight, so that layers that have changed places are told apart.
            sums[data.device] = sums.get(data.device, torch.zeros_like(total)) * 31 + total
    return f"{sum(int(total) for total in sums.values()) & 0xFFFFFFFF:08x}"
