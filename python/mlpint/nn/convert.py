"""Weights of the transformers library's GPT-2, BERT, ViT, Llama and its kin, to and from a BlockStack."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .row_names import Piece
from .settings import BlockSettings
from .stack import BlockStack

# The submodules of a layer that are each linear map or LayerNorm, by the names of either version of the library.
_SUBMODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "GPT2Block": {
        "ln1": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "proj": ("attn.c_proj",),
        "ln2": ("ln_2",),
        "up": ("mlp.c_fc",),
        "down": ("mlp.c_proj",),
    },
    "BertLayer": {
        "ln1": ("attention.output.LayerNorm",),
        "qkv": ("attention.self.query attention.self.key attention.self.value",),
        "proj": ("attention.output.dense",),
        "ln2": ("output.LayerNorm",),
        "up": ("intermediate.dense",),
        "down": ("output.dense",),
    },
    "ViTLayer": {
        "ln1": ("layernorm_before",),
        "qkv": (
            "attention.q_proj attention.k_proj attention.v_proj",
            "attention.attention.query attention.attention.key attention.attention.value",
        ),
        "proj": ("attention.o_proj", "attention.output.dense"),
        "ln2": ("layernorm_after",),
        "up": ("mlp.fc1", "intermediate.dense"),
        "down": ("mlp.fc2", "output.dense"),
    },
}
_LLAMA: dict[str, tuple[str, ...]] = {
    "ln1": ("input_layernorm",),
    "qkv": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj",),
    "proj": ("self_attn.o_proj",),
    "ln2": ("post_attention_layernorm",),
    "up": ("mlp.gate_proj mlp.up_proj",),
    "down": ("mlp.down_proj",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
}
_OUTPUT_NORMS = {"ln1_out": ("post_attention_layernorm",), "ln2_out": ("post_feedforward_layernorm",)}
_LIKE_LLAMA = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "GemmaDecoderLayer",
)
_SUBMODULES |= dict.fromkeys(_LIKE_LLAMA, _LLAMA)
_SUBMODULES["Olmo2DecoderLayer"] = _LLAMA | _OUTPUT_NORMS
_SUBMODULES["Gemma2DecoderLayer"] = _LLAMA | _OUTPUT_NORMS | {"ln2": ("pre_feedforward_layernorm",)}
_MODERN = (*_LIKE_LLAMA, "Olmo2DecoderLayer", "Gemma2DecoderLayer")
_NORMS = {"Olmo2DecoderLayer": "output", "Gemma2DecoderLayer": "sandwich"}
_QK_NORMS: dict[str, bool | str] = {"Qwen3DecoderLayer": True, "Olmo2DecoderLayer": "all"}
_GATES = {"silu": "silu gated", "gelu": "gelu gated", "gelu_pytorch_tanh": "gelu gated"}
_PLAIN: dict[str, dict[str, Any]] = {"gelu": {"gelu": "none"}, "relu": {"feed_forward": "relu"}}
_PLAIN |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), {"gelu": "tanh"})


def from_transformers(model: nn.Module) -> BlockStack:
    """The layers of a model as a stack with copies of their weights; they compute the same.

    GPT-2, BERT, ViT, Llama, Mistral, Qwen2, Qwen3, OLMo 2, Gemma and, without its capped scores, Gemma 2.

    Right-padded batches are given by ``lengths``; in the places of padding the states are not those of the library,
    whose padded queries attend to all keys.

    Args:
        model: with or without a head.

    Raises:
        ValueError: a model that is none of these, or a variant of one that blocks do not compute.
    """
    return stack_of(layers_of(model), model.config)


def stack_of(layers: Sequence[nn.Module], config: Any) -> BlockStack:
    """As :func:`from_transformers`, of layers and the configuration that they were made by."""
    settings = settings_of(layers[0], config)
    stack = BlockStack._not_filled(settings, range(len(layers)), None, layers[0].training)
    first = next(layers[0].parameters())
    stack.to(first.device, first.dtype)
    pieces = pieces_of(layers[0], settings)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for piece in pieces:
                piece.take(getattr(stack, piece.field)[i], layer.get_parameter(piece.name))
        if _lacks_qkv_bias(stack, pieces):
            stack.weights().qkv_bias.zero_().requires_grad_(False)  # and stays so
    return stack


def to_transformers(stack: BlockStack, model: nn.Module) -> None:
    """Copies a stack's weights into the layers of a model that it could have come from.

    Raises:
        ValueError: the model's layers are others, in number or in what they compute.
    """
    layers = layers_of(model)
    settings = settings_of(layers[0], model.config)
    if len(layers) != len(stack) or settings != stack.settings:
        raise ValueError(
            f"the model has {len(layers)} layers with {settings}, the stack {len(stack)} with {stack.settings}"
        )
    pieces = pieces_of(layers[0], settings)
    if _lacks_qkv_bias(stack, pieces) and bool(stack.weights().qkv_bias.detach().any()):
        raise ValueError("the stack has learnt a qkv_bias and the model has none: make the model with qkv_bias=True")
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for piece in pieces:
                layer.get_parameter(piece.name).copy_(piece.kept(getattr(stack, piece.field)[i]))


def _lacks_qkv_bias(stack: BlockStack, pieces: Sequence[Piece]) -> bool:
    """Whether queries, keys and values have no bias though the blocks of that kind do (some ViTs)."""
    return stack.settings.biases != "none" and all(piece.field != "qkv_bias" for piece in pieces)


def layers_of(model: nn.Module) -> list[nn.Module]:
    layers = [m for m in model.modules() if type(m).__name__ in _SUBMODULES]
    if not layers or len({type(m).__name__ for m in layers}) > 1:
        raise ValueError(
            f"{type(model).__name__} has no layers of the kinds {', '.join(_SUBMODULES)}, or several: only these can "
            "be converted; other stacks can be parallelized as they are"
        )
    return layers


def settings_of(layer: nn.Module, config: Any) -> BlockSettings:
    """What a layer of the library computes, made by this configuration.

    Raises:
        ValueError: blocks do not compute it.
    """
    kind = type(layer).__name__
    if kind in _MODERN:
        return _modern_settings(layer, config)
    refused: dict[str, object] = {"add_cross_attention": False, "position_embedding_type": "absolute"}
    if kind == "GPT2Block":
        refused |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for name, needed in refused.items():
        if getattr(config, name, needed) != needed:
            raise ValueError(f"{name} = {getattr(config, name)!r}: blocks compute {name} = {needed!r} only")
    act = config.activation_function if kind == "GPT2Block" else config.hidden_act
    if act not in _PLAIN:
        raise ValueError(f"the model's activation is {act!r}: blocks have {', '.join(map(repr, _PLAIN))}")
    if kind == "GPT2Block":
        return BlockSettings(
            config.hidden_size,
            config.num_attention_heads,
            config.n_inner or 4 * config.hidden_size,
            **_PLAIN[act],
            eps=config.layer_norm_epsilon,
            dropout=config.resid_pdrop,
            attention_dropout=config.attn_pdrop,
        )
    return BlockSettings(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        attention="causal" if getattr(config, "is_decoder", False) else "full",
        norm="post" if kind == "BertLayer" else "pre",
        **_PLAIN[act],
        eps=config.layer_norm_eps,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
    )


def _modern_settings(layer: nn.Module, config: Any) -> BlockSettings:
    kind = type(layer).__name__
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    if act not in _GATES:
        raise ValueError(f"the model's activation is {act!r}: blocks have {', '.join(map(repr, _GATES))}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"attn_logit_softcapping = {config.attn_logit_softcapping}: blocks do not cap scores; set it to None"
        )
    if getattr(config, "mlp_bias", False):
        raise ValueError("mlp_bias = True: blocks have no bias in a gated second half")
    bias = {
        part: getattr(layer.get_submodule(f"self_attn.{part}"), "bias", None) is not None
        for part in ("q_proj", "o_proj")
    }
    if bias["o_proj"]:
        raise ValueError("attention_bias = True: blocks have a bias of queries, keys and values alone")
    return BlockSettings(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        gelu="tanh" if act == "gelu_pytorch_tanh" else "none",
        eps=config.rms_norm_eps,
        attention_dropout=getattr(config, "attention_dropout", 0.0),
        normalization="rms",
        norm=_NORMS.get(kind, "pre"),
        feed_forward=_GATES[act],
        kv_heads=config.num_key_value_heads,
        head_width=getattr(config, "head_dim", None) or 0,
        biases="qkv" if bias["q_proj"] else "none",
        qk_norm=_QK_NORMS.get(kind, False),
        positions="rotary",
        score_scale=config.query_pre_attn_scalar**-0.5 if kind == "Gemma2DecoderLayer" else None,
        window=_window(config),
        **_rotary(config),
    )


def _window(config: Any) -> int | tuple[int, ...]:
    """How far each layer looks."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is None or window >= config.max_position_embeddings:
        return 0
    kinds = getattr(config, "layer_types", None)
    found = tuple(window if kind == "sliding_attention" else 0 for kind in kinds) if kinds else (window,)
    return found if len(set(found)) > 1 else found[0]


def _rotary(config: Any) -> dict[str, Any]:
    """Base and scaling of the positions, by the names of either version of the library."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    theta = {"rope_theta": float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return theta | {"rope_scaling": tuple(float(rope[name]) for name in names)}
    if kind == "yarn" and not (rope.get("mscale") or rope.get("mscale_all_dim")) and rope.get("truncate", True):
        factor = float(rope["factor"])
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        attention = rope.get("attention_factor") or 0.1 * math.log(max(factor, 1)) + 1
        fast, slow = (rope.get(name) or default for name, default in (("beta_fast", 32), ("beta_slow", 1)))
        return theta | {"yarn": (factor, float(fast), float(slow), float(original), float(attention))}
    raise ValueError(
        f"rope_type = {kind!r}: blocks have rotary positions as they are, or scaled as Llama 3's or YaRN's"
    )


def pieces_of(layer: nn.Module, settings: BlockSettings) -> tuple[Piece, ...]:
    """How a layer's own parameters are made of a row's."""
    pieces = []
    present = {field.rsplit("_", 1)[0] for field, shape in settings.shapes()._asdict().items() if shape is not None}
    for part in (part for part in _SUBMODULES[type(layer).__name__] if part in present):
        paths = _paths_of(layer, part)
        modules: list[Any] = [layer.get_submodule(path) for path in paths]
        ends = list(itertools.accumulate(len(module.weight) for module in modules))  # queries may be wider than keys
        for path, module, end in zip(paths, modules, ends, strict=True):
            rows = (end - len(module.weight), end) if len(paths) > 1 else None
            # GPT-2's Conv1D is a linear map with its weight transposed.
            turned = type(module).__name__ == "Conv1D"
            # Gemma's norms are kept as what they differ from 1 by.
            less = 1.0 if type(layer).__name__.startswith("Gemma") and part.startswith("ln") else 0.0
            for kind in ("weight", "bias"):
                if getattr(module, kind, None) is not None:
                    pieces.append(Piece(f"{path}.{kind}", f"{part}_{kind}", rows, turned and kind == "weight", less))
    return tuple(pieces)


def _paths_of(layer: nn.Module, part: str) -> list[str]:
    for paths in _SUBMODULES[type(layer).__name__][part]:
        try:
            for path in paths.split():
                layer.get_submodule(path)
        except AttributeError:
            continue
        return paths.split()
    raise ValueError(f"{type(layer).__name__} is laid out in another way than is known: there is no {part} in it")
