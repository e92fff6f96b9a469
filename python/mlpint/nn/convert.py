"""Weights of the transformers library's GPT-2, BERT, ViT, Llama and its kin, to and from a BlockStack."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .settings import BlockSettings, Weights
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
_GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


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
    layers = _layers(model)
    stack = BlockStack._not_filled(_settings_of(model), range(len(layers)), None, model.training)
    first = next(layers[0].parameters())
    stack.to(first.device, first.dtype)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for name, stacked in _present(stack):
                for theirs, ours in _pairs(layer, name, stacked[i]):
                    ours.copy_(theirs + _offset(layer, name)) if theirs is not None else ours.zero_()
    if _lacks_qkv_bias(model):
        stack.weights().qkv_bias.requires_grad_(False)  # zero, and stays so
    return stack


def to_transformers(stack: BlockStack, model: nn.Module) -> None:
    """Copies a stack's weights into the layers of a model that it could have come from.

    Raises:
        ValueError: the model's layers are others, in number or in what they compute.
    """
    layers, settings = _layers(model), _settings_of(model)
    if len(layers) != len(stack) or settings != stack.settings:
        raise ValueError(
            f"the model has {len(layers)} layers with {settings}, the stack {len(stack)} with {stack.settings}"
        )
    if _lacks_qkv_bias(model) and bool(stack.weights().qkv_bias.detach().any()):
        raise ValueError("the stack has learnt a qkv_bias and the model has none: make the model with qkv_bias=True")
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for name, stacked in _present(stack):
                for theirs, ours in _pairs(layer, name, stacked[i]):
                    if theirs is not None:
                        theirs.copy_(ours - _offset(layer, name))


def _offset(layer: nn.Module, name: str) -> int:
    """What a norm's weight is short of in the library: Gemma's are kept as what they differ from 1 by."""
    return 1 if type(layer).__name__.startswith("Gemma") and name.startswith("ln") else 0


def _present(stack: BlockStack) -> list[tuple[str, torch.Tensor]]:
    return [(name, p) for name, p in zip(Weights._fields, stack.weights(), strict=True) if p is not None]


def _lacks_qkv_bias(model: nn.Module) -> bool:
    """Whether queries, keys and values have no bias though the blocks of that kind do (some ViTs)."""
    return type(_layers(model)[0]).__name__ not in _MODERN and not getattr(model.config, "qkv_bias", True)


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = [m for m in model.modules() if type(m).__name__ in _SUBMODULES]
    if not layers or len({type(m).__name__ for m in layers}) > 1:
        raise ValueError(
            f"{type(model).__name__} has no layers of the kinds {', '.join(_SUBMODULES)}, or several: only these can "
            "be converted; other stacks can be parallelized as they are"
        )
    return layers


def _settings_of(model: nn.Module) -> BlockSettings:
    config: Any = model.config
    kind = type(_layers(model)[0]).__name__
    if kind in _MODERN:
        return _modern_settings(model, kind)
    refused: dict[str, object] = {"add_cross_attention": False, "position_embedding_type": "absolute"}
    if kind == "GPT2Block":
        refused |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for name, needed in refused.items():
        if getattr(config, name, needed) != needed:
            raise ValueError(f"{name} = {getattr(config, name)!r}: blocks compute {name} = {needed!r} only")
    act = config.activation_function if kind == "GPT2Block" else config.hidden_act
    if act not in _GELU:
        raise ValueError(f"the model's activation is {act!r}: blocks have {', '.join(map(repr, _GELU))}")
    if kind == "GPT2Block":
        return BlockSettings(
            config.hidden_size,
            config.num_attention_heads,
            config.n_inner or 4 * config.hidden_size,
            gelu=_GELU[act],
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
        gelu=_GELU[act],
        eps=config.layer_norm_eps,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
    )


def _modern_settings(model: nn.Module, kind: str) -> BlockSettings:
    config: Any = model.config
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    if act not in _GATES:
        raise ValueError(f"the model's activation is {act!r}: blocks have {', '.join(map(repr, _GATES))}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"attn_logit_softcapping = {config.attn_logit_softcapping}: blocks do not cap scores; set it to None"
        )
    if getattr(config, "mlp_bias", False):
        raise ValueError("mlp_bias = True: blocks have no bias in a gated second half")
    layer = _layers(model)[0]
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


def _pairs(layer: nn.Module, name: str, row: torch.Tensor) -> Iterator[tuple[Any, torch.Tensor]]:
    """A layer's own tensors (None: it has no such bias) and the views of a stack's row that correspond to them."""
    part, kind = name.rsplit("_", 1)
    paths = _paths_of(layer, part)
    modules: list[Any] = [layer.get_submodule(path) for path in paths]
    # Grouped queries are wider than keys and values.
    widths = [len(module.weight) for module in modules] if len(modules) > 1 else [len(row)]
    for module, ours in zip(modules, row.split(widths), strict=True):
        theirs = getattr(module, kind)
        # GPT-2's Conv1D is a linear map with its weight transposed.
        yield (theirs.t() if type(module).__name__ == "Conv1D" and kind == "weight" else theirs), ours


def _paths_of(layer: nn.Module, part: str) -> list[str]:
    for paths in _SUBMODULES[type(layer).__name__][part]:
        try:
            for path in paths.split():
                layer.get_submodule(path)
        except AttributeError:
            continue
        return paths.split()
    raise ValueError(f"{type(layer).__name__} is laid out in another way than is known: there is no {part} in it")
