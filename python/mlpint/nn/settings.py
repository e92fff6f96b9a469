"""What a block computes, apart from its weights, and the order and names of the weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Generic, NamedTuple, TypeVar

import torch

T_co = TypeVar("T_co", covariant=True)


class Weights(NamedTuple, Generic[T_co]):
    """The parameters of one block, or of J of them with a leading dimension J. Linear weights are [out, in].

    ``Weights[torch.Tensor]`` are the parameters themselves; other types stand for something about each of them.
    """

    ln1_weight: T_co  # [D]
    ln1_bias: T_co  # [D]
    qkv_weight: T_co  # [3 D, D]: queries, keys, values, each head after head
    qkv_bias: T_co  # [3 D]
    proj_weight: T_co  # [D, D]
    proj_bias: T_co  # [D]
    ln2_weight: T_co  # [D]
    ln2_bias: T_co  # [D]
    up_weight: T_co  # [F, D]
    up_bias: T_co  # [F]
    down_weight: T_co  # [D, F]
    down_bias: T_co  # [D]


# These are the names of the same parameters in a block, which has them in submodules: "ln1.weight" for ln1_weight.
NAMES = tuple(field.replace("_", ".") for field in Weights._fields)


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

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "ffn"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: must be a positive integer")
        if self.dim % self.heads:
            raise ValueError(f"heads = {self.heads}: must divide dim = {self.dim}")
        choices = {"attention": ("causal", "full"), "norm": ("pre", "post"), "gelu": ("tanh", "none")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {' or '.join(map(repr, allowed))}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be in [0, 1)")
        for name in ("eps", "step_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be positive")

    @property
    def causal(self) -> bool:
        """Whether a token attends to itself and to what is before it only."""
        return self.attention == "causal"

    @property
    def head_dim(self) -> int:
        """The channels of one attention head."""
        return self.dim // self.heads

    @property
    def scale(self) -> float:
        """The factor of the attention scores before the softmax."""
        return 1 / math.sqrt(self.head_dim)

    def shapes(self) -> Weights[tuple[int, ...]]:
        """The shapes of one block's parameters."""
        d, f = self.dim, self.ffn
        return Weights((d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (f, d), (f,), (d, f), (d,))

    def check_state(self, x: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Raises a ValueError where a block cannot take this state or these key lengths."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x is {tuple(x.shape)}: a block of dim {self.dim} takes [batch, sequence, {self.dim}]")
        if lengths is not None and (
            not isinstance(lengths, torch.Tensor)
            or lengths.shape != x.shape[:1]
            or lengths.is_floating_point()
            or lengths.dtype == torch.bool
        ):
            got = (
                f"{lengths.dtype} of shape {tuple(lengths.shape)}"
                if isinstance(lengths, torch.Tensor)
                else f"a {type(lengths).__name__}"
            )
            raise ValueError(f"lengths is {got}: must be an integer tensor with one entry for each of {len(x)} rows")
