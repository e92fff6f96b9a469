"""What models of the transformers library need beside a replaced stack."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from .looped_stack import REMEDIES, LoopedStack, refuse
from .position_bias import BiasedStack, hands_on_a_bias


def pretrained_models(model: nn.Module) -> dict[str, nn.Module]:
    """The models of the transformers library in a model, itself included, by name."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return {}
    return {name: m for name, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)}


def encoder_and_decoder(model: nn.Module) -> list[str]:
    """The names of both parts of an encoder-decoder model; empty for others."""
    part: Any
    for part in pretrained_models(model).values():
        if getattr(part.config, "is_encoder_decoder", False):
            parts = part.get_encoder(), part.get_decoder()
            names = [next((name for name, m in model.named_modules() if m is found), "") for found in parts]
            return names if all(names) and names[0] != names[1] else []
    return []


def stack_type(model: nn.Module, path: str) -> type[LoopedStack]:
    """What can take the place of a stack, given by its name.

    Raises:
        ValueError: nothing can.
    """
    layer = next(model.get_submodule(path).children())
    biased = "position_bias" in inspect.signature(layer.forward).parameters
    for prefix, part in model.named_modules():
        if _within(path, prefix):
            for name, share in _layerdrop(part).items():
                raise ValueError(
                    f"{name} = {share} in {type(part).__name__}: a layer-parallel stack drops none; set it to 0"
                )
    return BiasedStack if biased and hands_on_a_bias(layer) else LoopedStack


def prepare(model: nn.Module, paths: list[str]) -> None:
    """After the stacks were replaced: no caches by default, and a clear word where one asks for what lies inside it."""
    part: Any
    for prefix, part in pretrained_models(model).items():
        configs: tuple[Any, ...] = part.config, getattr(part, "generation_config", None)
        for config in configs:
            if getattr(config, "use_cache", False):
                config.use_cache = False
        if any(_within(path, prefix) for path in paths):
            part.register_forward_pre_hook(_refuse_recording, with_kwargs=True)


def _layerdrop(part: nn.Module) -> dict[str, float]:
    """The shares of layers that a model is to leave out in training, by name, where they are not 0."""
    shares = {"layerdrop": getattr(part, "layerdrop", 0)}
    config = getattr(part, "config", None)
    shares |= {f"config.{n}": getattr(config, n, 0) for n in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")}
    return {name: share for name, share in shares.items() if isinstance(share, int | float) and share > 0}


def _within(path: str, prefix: str) -> bool:
    return not prefix or path.startswith(f"{prefix}.")


def _refuse_recording(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    asked = {name: kwargs.get(name) for name in REMEDIES}
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        if asked[name] is None:
            asked[name] = getattr(model.config, name, False)
    refuse(asked)
