"""What models of the transformers library need beside a replaced stack."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .looped import REMEDIES, refuse


def pretrained_models(model: nn.Module) -> dict[str, nn.Module]:
    """The models of the transformers library in a model, itself included, by name."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return {}
    return {name: m for name, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)}


def check(model: nn.Module, path: str, named: bool) -> None:
    """Raises where a stack cannot be replaced as it is asked for.

    Args:
        path: name of the stack.
        named: whether the caller named it.
    """
    for prefix, part in pretrained_models(model).items():
        if not named and getattr(part.config, "is_encoder_decoder", False):
            kind = type(part).__name__
            raise ValueError(
                f'{kind} has two stacks, an encoder and a decoder; name one with stack="model.encoder.layers" or the '
                "like (their layers must return their state alone, which those of T5 do not)"
            )
    for prefix, part in model.named_modules():
        if _within(path, prefix) and (getattr(part, "layerdrop", 0) or 0) > 0:
            raise ValueError(
                f"layerdrop = {part.layerdrop} in {type(part).__name__}: a layer-parallel stack drops none; set 0"
            )


def prepare(model: nn.Module, path: str) -> None:
    """After the stack was replaced: no caches by default, and a clear word where one asks for what lies inside it."""
    for prefix, part in pretrained_models(model).items():
        for config in (part.config, getattr(part, "generation_config", None)):
            if getattr(config, "use_cache", False):
                config.use_cache = False
        if _within(path, prefix):
            part.register_forward_pre_hook(_refuse_recording, with_kwargs=True)


def _within(path: str, prefix: str) -> bool:
    return not prefix or path.startswith(f"{prefix}.")


def _refuse_recording(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    asked = {name: kwargs.get(name) for name in REMEDIES}
    for name in ("output_attentions", "output_hidden_states"):
        if asked[name] is None:
            asked[name] = getattr(model.config, name, False)
    refuse(asked)
