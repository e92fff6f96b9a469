"""What models of the transformers library need beside a replaced stack."""

from __future__ import annotations

import inspect
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


def is_encoder_decoder(model: nn.Module) -> bool:
    return any(getattr(part.config, "is_encoder_decoder", False) for part in pretrained_models(model).values())


def check(model: nn.Module, path: str) -> None:
    """Raises where a stack, given by its name, cannot be replaced."""
    layer = model.get_submodule(path)[0]
    if "position_bias" in inspect.signature(layer.forward).parameters:
        raise ValueError(
            f"the layers of {path} ({type(layer).__name__}) hand a position bias to each other beside their state, as "
            "T5's do; a layer-parallel stack passes on the state alone, so such models cannot be parallelized"
        )
    for prefix, part in model.named_modules():
        if _within(path, prefix) and (getattr(part, "layerdrop", 0) or 0) > 0:
            raise ValueError(
                f"layerdrop = {part.layerdrop} in {type(part).__name__}: a layer-parallel stack drops none; set it to 0"
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
