"""A transformer block as a residual step."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import cross_norm, differentiable, modern, post_norm, pre_norm
from .batch_arguments import BatchArguments, Rotation
from .random_keys import draw_key
from .settings import NAMES, NORMS, BlockSettings, Weights
from .step_context import StepContext, autocast_dtype, for_products, without_autocast


def batched_steps(settings: BlockSettings) -> ModuleType:
    """The module with the step of J blocks at once and its hand-written backward."""
    if settings.modern:
        return modern
    if settings.cross:
        return cross_norm
    return pre_norm if settings.norm == "pre" else post_norm


class Block(nn.Module):
    """A transformer block as a step x + h F(x): [batch, sequence, dim] -> the same shape.

    ``norm="pre"`` (GPT-2, ViT): y = x + O attention(QKV LN1 x), F(x) = y - x + W2 gelu(W1 LN2 y). ``norm="post"``
    (BERT): y = LN1(x + O attention(QKV x)), F(x) = LN2(y + W2 gelu(W1 y)) - x. At h = 1 the ordinary block.

    Other settings are those of today's language models (modern.py).

    Its backward comes in two halves (``split_forward``), so that :class:`mlpint.LayerParallel` takes the gradient for
    the input first and those for the weights later, neither of them twice. Dropout masks are a function of a key drawn
    from torch's CPU generator and of the place alone (see dropout.py).

    Args:
        dim: width.
        heads: attention heads; a divisor of ``dim``.

    Keyword args:
        ffn: inner width of the second half; 4 dim by default.
        attention: ``"causal"`` or ``"full"``.
        norm: ``"pre"`` or ``"post"``; or of what each half adds to the stream, alone (``"output"``, OLMo 2) or besides
            the one before it (``"sandwich"``, Gemma 2).
        gelu: torch's ``approximate``: ``"tanh"`` or ``"none"``, the exact one.
        eps: what the LayerNorms add to the variance.
        dropout: probability that an element of a residual increment is dropped.
        attention_dropout: probability that an attention weight is dropped; by default that of ``dropout``.
        step_size: h.
        depth: number of blocks in the model: projections onto the residual stream start smaller by sqrt(2 depth).
            The layer-parallel solver relies on such small increments.
        normalization: ``"layer"`` or ``"rms"`` (RMSNorm, no bias), but with ``norm="post"``.
        feed_forward: ``"gelu"``, ``"relu"``, ``"silu gated"`` (SwiGLU: W2 (silu(a) b), (a, b) = W1 x) or
            ``"gelu gated"``.
        kv_heads: heads of keys and values, a divisor of ``heads``; as many by default (grouped queries).
        head_width: channels of a head; dim / heads by default.
        biases: of linear maps: ``"all"``, ``"qkv"`` (that one alone) or ``"none"``.
        qk_norm: an RMSNorm over the channels of each query's and key's head; ``"all"``: over those of all heads.
        positions: ``"none"`` or ``"rotary"``, of queries and keys, with the base ``rope_theta``.
        rope_scaling: Llama 3's, as (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings).
        yarn: YaRN's, as (factor, beta_fast, beta_slow, original_max_position_embeddings, attention_factor).
        score_scale: factor of the attention scores; 1 / sqrt(head_width) by default.
        window: a token attends to those less than so many places away; 0: to all. A :class:`BlockStack` takes a tuple,
            too: the windows of layers 0, 1, ..., over and over.

    Raises:
        ValueError: naming an argument that is out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        ffn: int | None = None,
        attention: str = "causal",
        norm: str = "pre",
        gelu: str = "tanh",
        eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        step_size: float = 1.0,
        depth: int = 1,
        normalization: str = "layer",
        feed_forward: str = "gelu",
        kv_heads: int | None = None,
        head_width: int | None = None,
        biases: str = "all",
        qk_norm: bool | str = False,
        positions: str = "none",
        rope_theta: float = 10000.0,
        rope_scaling: tuple[float, float, float, float] | None = None,
        yarn: tuple[float, float, float, float, float] | None = None,
        score_scale: float | None = None,
        window: int = 0,
        cross: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(window, int):
            raise ValueError(f"window = {window!r}: one block has one window, a number; a BlockStack takes several")
        self.settings = BlockSettings(
            dim,
            heads,
            4 * dim if ffn is None else ffn,
            attention,
            norm,
            gelu,
            eps,
            dropout,
            dropout if attention_dropout is None else attention_dropout,
            step_size,
            normalization,
            feed_forward,
            kv_heads or 0,
            head_width or 0,
            biases,
            qk_norm,
            positions,
            rope_theta,
            rope_scaling,
            yarn,
            score_scale,
            window,
            cross,
        )
        device = torch.get_default_device()
        with torch.device("meta"):  # where torch's own initialisation costs nothing and draws no random numbers
            self._add_parts()
        initialize(self.to_empty(device=device).weights(), depth)

    @classmethod
    def _without_memory(cls, settings: BlockSettings) -> Block:
        """A block whose parameters are on the meta device, to be replaced."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.settings = settings
        with torch.device("meta"):
            block._add_parts()
        return block

    def _add_parts(self) -> None:
        """Adds the submodules in the order of :class:`Weights`, which ``parameters()`` then follows."""
        s, shapes = self.settings, self.settings.shapes()

        def norm() -> nn.Module:
            return nn.LayerNorm(s.dim, s.eps) if s.normalization == "layer" else nn.RMSNorm(s.dim, s.eps)

        def linear(weight: tuple[int, ...], bias: tuple[int, ...] | None) -> nn.Linear:
            return nn.Linear(weight[1], weight[0], bias is not None)

        self.ln1: nn.Module | None = norm() if shapes.ln1_weight else None
        self.qkv = linear(shapes.qkv_weight, shapes.qkv_bias)
        self.proj = linear(shapes.proj_weight, shapes.proj_bias)
        self.ln2: nn.Module | None = norm() if shapes.ln2_weight else None
        self.up, self.down = linear(shapes.up_weight, shapes.up_bias), linear(shapes.down_weight, shapes.down_bias)
        if s.qk_norm:
            self.q_norm = nn.RMSNorm(shapes.q_norm_weight, s.eps)
            self.k_norm = nn.RMSNorm(shapes.k_norm_weight, s.eps)
        if shapes.ln1_out_weight:
            self.ln1_out, self.ln2_out = norm(), norm()
        if s.cross:
            self.ln_cross, self.ln_memory = norm(), norm()
            self.cross_q = linear(shapes.cross_q_weight, shapes.cross_q_bias)
            self.cross_kv = linear(shapes.cross_kv_weight, shapes.cross_kv_bias)
            self.cross_proj = linear(shapes.cross_proj_weight, shapes.cross_proj_bias)

    def weights(self) -> Weights[torch.Tensor]:
        """The parameters themselves."""
        return Weights(*(self._parameter(name) for name in NAMES))

    def _parameter(self, name: str) -> Any:
        part, _, kind = name.partition(".")
        return getattr(getattr(self, part, None), kind, None)

    def extra_repr(self) -> str:
        s = self.settings
        return f"attention={s.attention!r}, norm={s.norm!r}, heads={s.heads}, gelu={s.gelu!r}, dropout={s.dropout}"

    def _draw_key(self) -> int | None:
        s = self.settings
        return draw_key() if self.training and (s.dropout or s.attention_dropout) else None

    def forward(
        self,
        x: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        rotation: Rotation | None = None,
        memory: torch.Tensor | None = None,
        memory_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step.

        Args:
            x: [batch, sequence, dim].
            lengths: [batch] integers; keys from there on are not attended to, and what a query from there on would
                attend to counts as 0. None: all of the sequence.

        Keyword args:
            attention_mask: in the place of causality, windows and lengths: [batch or 1, 1, sequence or 1, sequence],
                booleans, True where a token (row) sees another, or numbers that are added to the scores.
            rotation: cosine and sine of rotary positions in the place of those of 0, 1, ...: [batch or 1, sequence,
                head_width / 2] each.
            memory: what blocks with ``cross`` attend to, [batch, any sequence, dim].
            memory_lengths: [batch] integers; the memory from there on is not attended to. None: all of it is.
        """
        context = self._context(x, BatchArguments(lengths, attention_mask, rotation, memory_lengths), memory)
        return differentiable.step(context, self.weights(), x)

    def _context(self, x: torch.Tensor, arguments: BatchArguments, memory: torch.Tensor | None) -> StepContext:
        arguments.check(self.settings, x, memory)
        key = self._draw_key()
        keys = None if key is None else [key]
        stacked = None if memory is None else memory[None]
        return StepContext.of(self.settings, arguments, [0], x.shape, keys, self.settings.step_size, stacked)

    def split_forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None = None, *, memory: torch.Tensor | None = None, **more: Any
    ) -> tuple[torch.Tensor, BlockTape]:
        """One step without autograd, and the tape for its backward (:class:`mlpint.layers.tapes.SplitTape`)."""
        s = self.settings
        context = self._context(x, BatchArguments(lengths, **more), None if memory is None else memory.detach())
        parameters = self.weights()
        dtype = autocast_dtype(x.device)
        with torch.no_grad(), without_autocast(x.device):
            weights = for_products(parameters.map(lambda p: p.detach()[None]), dtype)
            out, saved = batched_steps(s).forward_train(context, weights, x.detach().reshape(1, -1, s.dim))
        return out.view_as(x), BlockTape(context, parameters, weights, saved)


class BlockTape:
    """What one evaluation of a block has saved, with its backward in two halves."""

    def __init__(
        self,
        context: StepContext,
        parameters: Weights[torch.Tensor],
        weights: Weights[torch.Tensor],
        saved: tuple[torch.Tensor, ...],
    ) -> None:
        self._context, self._parameters, self._weights, self._saved = context, parameters, weights, saved
        self._step = batched_steps(context.settings)
        self._inner: tuple[torch.Tensor, ...] | None = None

    def input_vjp(self, grad_output: torch.Tensor) -> torch.Tensor:
        """The gradient for the input; several calls are allowed, and the last one counts for the weights."""
        with torch.no_grad(), without_autocast(grad_output.device):
            grad = grad_output.reshape(1, -1, grad_output.shape[-1])
            dx, self._inner = self._step.input_vjp(self._context, self._weights, self._saved, grad)
        return dx.view_as(grad_output)

    def weight_vjp(self) -> list[torch.Tensor | None]:
        """The gradients of the parameters that require one, for the gradient that the last ``input_vjp`` was given."""
        with torch.no_grad(), without_autocast(self._saved[0].device):
            into = self._parameters.map(lambda p: torch.empty_like(p)[None] if p.requires_grad else None)
            self._step.weight_vjp(self._context, self._weights, self._saved, self._inner, into)
        return [t[0] for t in into.present()]


@torch.no_grad()
def initialize(w: Weights[torch.Tensor], depth: int) -> None:
    """Fills the weights as GPT-2's: normal with deviation 0.02, smaller onto the stream; LayerNorms the identity."""
    onto_stream = ("proj_weight", "down_weight", "cross_proj_weight")
    increments = sum(p is not None for p in (w.proj_weight, w.down_weight, w.cross_proj_weight))
    for name, p in zip(Weights._fields, w, strict=True):
        if p is None:
            continue
        if name.endswith("bias"):
            p.zero_()
        elif name.startswith(NORMS):
            p.fill_(1)
        else:
            p.normal_(std=0.02 / math.sqrt(increments * depth) if name in onto_stream else 0.02)
