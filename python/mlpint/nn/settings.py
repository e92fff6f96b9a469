"""What a block computes, apart from its weights, and the order and names of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

T_co = TypeVar("T_co", covariant=True)


class Weights(NamedTuple, Generic[T_co]):
    """The parameters of one block, or of J of them with a leading dimension J. Linear weights are [out, in].

    ``Weights[torch.Tensor]`` are the parameters themselves; other types stand for something about each of them. What a
    block does not have is None: biases, a LayerNorm's bias where the norm is an RMSNorm, norms that are not there.
    H query heads and K of keys and values have hd channels each; D = H hd and K = H where nothing else is said.
    """

    ln1_weight: T_co  # [D]
    ln1_bias: T_co  # [D]
    qkv_weight: T_co  # [(H + 2 K) hd, D]: queries, keys, values, each head after head
    qkv_bias: T_co  # [(H + 2 K) hd]
    proj_weight: T_co  # [D, H hd]
    proj_bias: T_co  # [D]
    ln2_weight: T_co  # [D]
    ln2_bias: T_co  # [D]
    up_weight: T_co  # [F, D]; gated [2 F, D], the gate's rows first
    up_bias: T_co  # [F] or [2 F]
    down_weight: T_co  # [D, F]
    down_bias: T_co  # [D]
    q_norm_weight: T_co = None  # type: ignore[assignment]  # [hd], or [H hd]
    k_norm_weight: T_co = None  # type: ignore[assignment]  # [hd], or [K hd]
    ln1_out_weight: T_co = None  # type: ignore[assignment]  # [D], of what attention adds to the stream
    ln1_out_bias: T_co = None  # type: ignore[assignment]  # [D]
    ln2_out_weight: T_co = None  # type: ignore[assignment]  # [D], of what the second half adds
    ln2_out_bias: T_co = None  # type: ignore[assignment]  # [D]
    ln_cross_weight: T_co = None  # type: ignore[assignment]  # [D], before the queries of cross-attention
    ln_cross_bias: T_co = None  # type: ignore[assignment]  # [D]
    ln_memory_weight: T_co = None  # type: ignore[assignment]  # [D], before its keys and values
    ln_memory_bias: T_co = None  # type: ignore[assignment]  # [D]
    cross_q_weight: T_co = None  # type: ignore[assignment]  # [D, D]
    cross_q_bias: T_co = None  # type: ignore[assignment]  # [D]
    cross_kv_weight: T_co = None  # type: ignore[assignment]  # [2 D, D]: keys, values, each head after head
    cross_kv_bias: T_co = None  # type: ignore[assignment]  # [2 D]
    cross_proj_weight: T_co = None  # type: ignore[assignment]  # [D, D]
    cross_proj_bias: T_co = None  # type: ignore[assignment]  # [D]

    def map(self, function: Callable[[Any], Any]) -> Weights[Any]:
        """The function of each, and None where there is None."""
        return Weights(*(None if t is None else function(t) for t in self))

    def present(self) -> list[T_co]:
        """Those that there are."""
        return [t for t in self if t is not None]


# These are the names of the same parameters in a block, which has them in submodules: "ln1.weight" for ln1_weight.
NAMES = tuple(".".join(field.rsplit("_", 1)) for field in Weights._fields)

NORMS = ("ln", "q_norm", "k_norm")  # how the fields of norms begin


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """What a block computes, apart from its weights; :class:`mlpint.nn.Block` says what each argument means."""

    dim: int
    heads: int
    ffn: int
    attention: str = "causal"
    norm: str = "pre"
    gelu: str = "tanh"
    eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    step_size: float = 1.0
    normalization: str = "layer"
    feed_forward: str = "gelu"
    kv_heads: int = 0
    head_width: int = 0
    biases: str = "all"
    qk_norm: bool | str = False
    positions: str = "none"
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, float, float, float] | None = None
    yarn: tuple[float, float, float, float, float] | None = None
    score_scale: float | None = None
    window: int | tuple[int, ...] = 0
    cross: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "ffn"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: must be a positive integer")
        for name in ("kv_heads", "head_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} = {value!r}: must be a positive integer, or 0")
        if self.dim % self.heads and not self.head_width:
            raise ValueError(f"heads = {self.heads}: must divide dim = {self.dim}")
        # So that settings that compute the same are the same.
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_width", self.head_width or self.dim // self.heads)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads}: must divide heads = {self.heads}")
        choices: dict[str, tuple[Any, ...]] = {
            "attention": ("causal", "full"),
            "norm": ("pre", "post", "output", "sandwich"),
            "gelu": ("tanh", "none"),
        }
        choices |= {"normalization": ("layer", "rms"), "feed_forward": ("gelu", "relu", "silu gated", "gelu gated")}
        choices |= {"biases": ("all", "qkv", "none"), "positions": ("none", "rotary"), "qk_norm": (False, True, "all")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {' or '.join(map(repr, allowed))}")
        if self.rope_scaling is not None and self.yarn is not None:
            raise ValueError("rope_scaling and yarn are two ways to stretch the same positions: give one of them")
        for window in self.window_pattern or (None,):
            if isinstance(window, bool) or not isinstance(window, int) or window < 0:
                raise ValueError(f"window = {self.window!r}: must be a number of tokens, or 0 for all of them")
        if self.score_scale is not None and not self.score_scale > 0:
            raise ValueError(f"score_scale = {self.score_scale!r}: must be positive")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be in [0, 1)")
        for name in ("eps", "step_size", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be positive")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"positions = 'rotary': the {self.head_width} channels of a head must be an even number")
        if self.modern and self.norm == "post":  # where the norm is of the stream itself
            raise ValueError("norm = 'post': is for blocks with LayerNorms, a gelu or relu and all biases")
        if self.cross and (self.modern or self.norm == "post"):
            raise ValueError("cross = True: is for blocks with norm = 'pre', LayerNorms, a gelu or relu and all biases")

    @property
    def modern(self) -> bool:
        """Whether a block computes more than GPT-2's; see modern.py."""
        plain = self.normalization == "layer" and not self.gated and self.biases == "all"
        plain = plain and self.kv_heads == self.heads and self.head_width * self.heads == self.dim
        plain = plain and not self.qk_norm and self.positions == "none"
        return not plain or self.norm in ("output", "sandwich")

    @property
    def window_pattern(self) -> tuple[int, ...]:
        """The windows of layers 0, 1, ..., over and over; 0: all of the sequence."""
        return self.window if isinstance(self.window, tuple) else (self.window,)

    def windows(self, layers: Iterable[int], sequence: int) -> tuple[int, ...] | None:
        """How far each of these layers looks in a sequence so long; None where each sees all of it."""
        pattern = self.window_pattern
        if not any(pattern):
            return None
        found = tuple(pattern[n % len(pattern)] or sequence for n in layers)
        return found if min(found) < sequence else None

    def of_layer(self, n: int) -> BlockSettings:
        """Those of one block of a stack: its own window."""
        return dataclasses.replace(self, window=self.window_pattern[n % len(self.window_pattern)])

    @property
    def gated(self) -> bool:
        """Whether the inner width is a product of two linear maps, one behind an activation."""
        return self.feed_forward.endswith("gated")

    @property
    def causal(self) -> bool:
        """Whether a token attends to itself and to what is before it only."""
        return self.attention == "causal"

    @property
    def activation(self) -> str:
        """The name by which :func:`mlpint.nn.ops.activate` knows the activation."""
        if self.feed_forward in ("relu", "silu gated"):
            return self.feed_forward.removesuffix(" gated")
        return "gelu_tanh" if self.gelu == "tanh" else "gelu"

    @property
    def scale(self) -> float:
        """The factor of the attention scores before the softmax."""
        return 1 / math.sqrt(self.head_width) if self.score_scale is None else self.score_scale

    def shapes(self) -> Weights[tuple[int, ...]]:
        """The shapes of one block's parameters; None for those that it does not have."""
        d, f, hd = self.dim, self.ffn, self.head_width
        qkv, o, up = (self.heads + 2 * self.kv_heads) * hd, self.heads * hd, 2 * f if self.gated else f
        of_q, of_k = (self.heads * hd, self.kv_heads * hd) if self.qk_norm == "all" else (hd, hd)
        norm, inner = ((d,), (d,)), ((of_q,), (of_k,))
        cross = *norm, *norm, (d, d), (d,), (2 * d, d), (2 * d,), (d, d), (d,)
        every = Weights[Any](
            *norm, (qkv, d), (qkv,), (d, o), (d,), *norm, (up, d), (up,), (d, f), (d,), *inner, *norm, *norm, *cross
        )
        absent = [] if self.cross else [name for name in Weights._fields if "cross" in name or "memory" in name]
        absent += [] if self.qk_norm else ["q_norm_weight", "k_norm_weight"]
        absent += [] if self.biases == "all" else ["proj_bias", "up_bias", "down_bias"]
        absent += ["qkv_bias"] if self.biases == "none" else []
        inward, outward = (self.norm in kinds for kinds in (("pre", "post", "sandwich"), ("output", "sandwich")))
        for name, there in {"ln1": inward, "ln2": inward, "ln1_out": outward, "ln2_out": outward}.items():
            absent += [] if there else [f"{name}_weight"]
            absent += [] if there and self.normalization == "layer" else [f"{name}_bias"]
        return every._replace(**dict.fromkeys(absent))

    def check_state(self, x: torch.Tensor) -> None:
        """Raises a ValueError where a block cannot take this state."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x is {tuple(x.shape)}: a block of dim {self.dim} takes [batch, sequence, {self.dim}]")
