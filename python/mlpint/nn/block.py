"""A transformer block as a residual step."""

from __future__ import annotations

import math

import torch
from torch import nn

from . import attention as attn
from . import differentiable, post_norm, pre_norm
from .random_keys import draw_key
from .settings import BlockSettings, Weights
from .step_context import StepContext, autocast_dtype, for_products

# The modules with the step of J blocks at once and its hand-written backward, by where the LayerNorms stand.
BATCHED_STEPS = {"pre": pre_norm, "post": post_norm}


class Block(nn.Module):
    """A transformer block as a step x + h F(x): [batch, sequence, dim] -> the same shape.

    ``norm="pre"`` (GPT-2, ViT): y = x + O attention(QKV LN1 x), F(x) = y - x + W2 gelu(W1 LN2 y). ``norm="post"``
    (BERT): y = LN1(x + O attention(QKV x)), F(x) = LN2(y + W2 gelu(W1 y)) - x. At h = 1 the ordinary block.

    Its backward comes in two halves (``split_forward``), so that :class:`mlpint.LayerParallel` takes the gradient for
    the input first and those for the weights later, neither of them twice. Dropout masks are a function of a key drawn
    from torch's CPU generator and of the place alone (see dropout.py).

    Args:
        dim: width.
        heads: attention heads; a divisor of ``dim``.

    Keyword args:
        ffn: inner width of the second half; 4 dim by default.
        attention: ``"causal"`` or ``"full"``.
        norm: ``"pre"`` or ``"post"``.
        gelu: torch's ``approximate``: ``"tanh"`` or ``"none"``, the exact one.
        eps: what the LayerNorms add to the variance.
        dropout: probability that an element of a residual increment is dropped.
        attention_dropout: probability that an attention weight is dropped; by default that of ``dropout``.
        step_size: h.
        depth: number of blocks in the model: projections onto the residual stream start smaller by sqrt(2 depth).
            The layer-parallel solver relies on such small increments.

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
    ) -> None:
        super().__init__()
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
        dim, ffn, eps = self.settings.dim, self.settings.ffn, self.settings.eps
        self.ln1, self.qkv, self.proj = nn.LayerNorm(dim, eps), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ln2, self.up, self.down = nn.LayerNorm(dim, eps), nn.Linear(dim, ffn), nn.Linear(ffn, dim)

    def weights(self) -> Weights[torch.Tensor]:
        """The parameters themselves."""
        parts = (self.ln1, self.qkv, self.proj, self.ln2, self.up, self.down)
        return Weights(*(p for part in parts for p in (part.weight, part.bias)))

    def extra_repr(self) -> str:
        s = self.settings
        return f"attention={s.attention!r}, norm={s.norm!r}, heads={s.heads}, gelu={s.gelu!r}, dropout={s.dropout}"

    def _draw_key(self) -> int | None:
        s = self.settings
        return draw_key() if self.training and (s.dropout or s.attention_dropout) else None

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """One step.

        Args:
            x: [batch, sequence, dim].
            lengths: [batch] integers; keys from there on are not attended to, and what a query from there on would
                attend to counts as 0. None: all of the sequence.
        """
        self.settings.check_state(x, lengths)
        return differentiable.step(self.settings, self.weights(), x, lengths, self._draw_key(), self.settings.step_size)

    def split_forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, BlockTape]:
        """One step without autograd, and the tape for its backward (:class:`mlpint.layers.tapes.SplitTape`)."""
        s = self.settings
        s.check_state(x, lengths)
        key = self._draw_key()
        padding = None if lengths is None else attn.Padding(lengths, x.shape[1])
        context = StepContext(s, len(x), padding, None if key is None else [key], s.step_size)
        parameters = self.weights()
        dtype = autocast_dtype(x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            weights = for_products(Weights(*(p.detach()[None] for p in parameters)), dtype)
            out, saved = BATCHED_STEPS[s.norm].forward_train(context, weights, x.detach().reshape(1, -1, s.dim))
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
        self._step = BATCHED_STEPS[context.settings.norm]
        self._inner: tuple[torch.Tensor, ...] | None = None

    def input_vjp(self, grad_output: torch.Tensor) -> torch.Tensor:
        """The gradient for the input; several calls are allowed, and the last one counts for the weights."""
        with torch.no_grad(), torch.autocast(grad_output.device.type, enabled=False):
            grad = grad_output.reshape(1, -1, grad_output.shape[-1])
            dx, self._inner = self._step.input_vjp(self._context, self._weights, self._saved, grad)
        return dx.view_as(grad_output)

    def weight_vjp(self) -> list[torch.Tensor | None]:
        """The gradients of the parameters that require one, for the gradient that the last ``input_vjp`` was given."""
        with torch.no_grad(), torch.autocast(self._saved[0].device.type, enabled=False):
            into = Weights(*(torch.empty_like(p)[None] if p.requires_grad else None for p in self._parameters))
            self._step.weight_vjp(self._context, self._weights, self._saved, self._inner, into)
        return [t[0] for t in into if t is not None]


@torch.no_grad()
def initialize(w: Weights[torch.Tensor], depth: int) -> None:
    """Fills the weights as GPT-2's: normal with deviation 0.02, smaller onto the stream; LayerNorms the identity."""
    for name, p in zip(Weights._fields, w, strict=True):
        if name.endswith("bias"):
            p.zero_()
        elif name.startswith("ln"):
            p.fill_(1)
        else:
            p.normal_(std=0.02 / math.sqrt(2 * depth) if name in ("proj_weight", "down_weight") else 0.02)
