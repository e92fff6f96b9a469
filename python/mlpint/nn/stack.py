"""Blocks of one kind with stacked parameters."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import differentiable
from .batch_arguments import BatchArguments, Rotation
from .block import Block, initialize
from .random_keys import draw_key
from .row_names import RowPart, own_pieces
from .settings import NAMES, BlockSettings, Weights
from .step_context import StepContext

Watch = Callable[[int, torch.Tensor, torch.Tensor], None]


class BlockStack(nn.Module):
    """L blocks (:class:`Block`) run one after the other, whose parameters are stacked: ``qkv_weight`` is [L, 3 D, D].

    As the ``layers`` of :class:`mlpint.LayerParallel` the blocks of all intervals of a rank are evaluated in one go,
    through strided views of the stacked parameters. The keys of ``state_dict`` are those of an ``nn.ModuleList`` of
    blocks (``"0.ln1.weight"``), so that either loads what the other has saved.

    Args:
        layers: L.
        dim, heads, **settings: the arguments of each :class:`Block`; ``depth`` is L by default, and ``window`` may be a
            tuple, the windows of layers 0, 1, ..., over and over.
    """

    def __init__(self, layers: int, dim: int, heads: int, *, depth: int | None = None, **settings: Any) -> None:
        super().__init__()
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise ValueError(f"layers = {layers!r}: must be a positive integer")
        window = settings.pop("window", 0)
        with torch.device("meta"):
            block = Block(dim, heads, **settings)
        self.settings = dataclasses.replace(block.settings, window=window if isinstance(window, int) else tuple(window))
        self._build(range(layers))
        for n in range(layers):
            initialize(self.row(n), depth or layers)

    def _build(self, indices: Sequence[int], like: Weights[torch.Tensor] | None = None) -> None:
        """Registers parameters for so many rows, not filled, with the dtypes, devices and requires_grad of others."""
        self.indices = tuple(indices)  # of the rows in the whole stack
        self.pieces = own_pieces(self.settings.shapes())  # what rows are in state dicts
        self.saved_by_owner = False  # a LayerParallel saves and loads the rows under its own prefix
        self.watch: Watch | None = None  # called with (layer, input, output) where layers are evaluated
        others: Sequence[torch.Tensor | None] = like or [None] * len(Weights._fields)
        for name, shape, p in zip(Weights._fields, self.settings.shapes(), others, strict=True):
            if shape is None:
                self.register_parameter(name, None)
                continue
            dtype, device = (None, None) if p is None else (p.dtype, p.device)
            rows = torch.empty(len(self.indices), *shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(rows, p is None or p.requires_grad))

    @classmethod
    def _not_filled(
        cls, settings: BlockSettings, indices: Sequence[int], like: Weights[torch.Tensor] | None, training: bool
    ) -> BlockStack:
        """A stack with memory for so many rows, and nothing in it yet; ``like`` as :meth:`_build` takes it."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.settings = settings
        new._build(indices, like)
        return new.train(training)

    @classmethod
    def from_blocks(cls, blocks: Iterable[Block]) -> BlockStack:
        """A stack with the weights of so many blocks, copied.

        Raises:
            ValueError: they differ in settings, dtype, or in which parameters require gradients.
        """
        blocks = list(blocks)
        for n, block in enumerate(blocks):
            if not isinstance(block, Block):
                raise TypeError(f"block {n} is a {type(block).__name__}, not an mlpint.nn.Block")
            settings = dataclasses.replace(block.settings, window=blocks[0].settings.window)
            if settings != blocks[0].settings or block.training != blocks[0].training:
                raise ValueError(f"block {n} has other settings than block 0: {block.settings}, {blocks[0].settings}")
            for name, p, q in zip(NAMES, block.weights(), blocks[0].weights(), strict=True):
                if p is not None and q is not None and (p.requires_grad, p.dtype) != (q.requires_grad, q.dtype):
                    raise ValueError(
                        f"{name} of block {n} is {p.dtype} with requires_grad {p.requires_grad}, that of block 0 "
                        f"{q.dtype} with {q.requires_grad}: a stack has both in common; use an nn.ModuleList of blocks"
                    )
        if not blocks:
            raise ValueError("from_blocks got no blocks")
        windows = tuple(block.settings.window_pattern[0] for block in blocks)
        settings = dataclasses.replace(blocks[0].settings, window=windows if len(set(windows)) > 1 else windows[0])
        stack = cls._not_filled(settings, range(len(blocks)), blocks[0].weights(), blocks[0].training)
        with torch.no_grad():
            for stacked, rows in zip(stack.weights(), zip(*(b.weights() for b in blocks), strict=True), strict=True):
                if stacked is not None:
                    torch.stack(rows, out=stacked)
        return stack

    def to_blocks(self, kind: type[Block] = Block) -> nn.ModuleList:
        """The blocks with copies of their weights, and of their gradients where there are any."""
        blocks = nn.ModuleList()
        for i in range(len(self)):
            block = kind._without_memory(self.settings.of_layer(self.indices[i]))
            for name, stacked in self.named_weights():
                part, _, which = name.partition(".")
                p = nn.Parameter(stacked.detach()[i].clone(), stacked.requires_grad)
                p.grad = None if stacked.grad is None else stacked.grad[i].clone()
                setattr(getattr(block, part), which, p)
            blocks.append(block.train(self.training))
        return blocks

    def select(self, indices: Sequence[int]) -> BlockStack:
        """A stack of copies of some of the rows."""
        part = self._not_filled(self.settings, [self.indices[i] for i in indices], self.weights(), self.training)
        part.pieces = self.pieces
        with torch.no_grad():
            for p, q in zip(part.weights().present(), self.weights().present(), strict=True):
                p.copy_(q[list(indices)])
        return part

    def weights(self) -> Weights[nn.Parameter]:
        """The stacked parameters themselves."""
        return Weights(*(getattr(self, name) for name in Weights._fields))

    def named_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Those that there are, with what an unstacked block calls them."""
        return [(name, p) for name, p in zip(NAMES, self.weights(), strict=True) if p is not None]

    def row(self, n: int) -> Weights[torch.Tensor]:
        """Views of the parameters of layer n."""
        i = self.indices.index(n)
        return self.weights().map(lambda p: p.detach()[i])

    def __len__(self) -> int:
        return len(self.indices)

    def extra_repr(self) -> str:
        return f"{len(self)} blocks, {self.settings}"

    @property
    def drops(self) -> bool:
        """Whether dropout is on."""
        return self.training and bool(self.settings.dropout or self.settings.attention_dropout)

    # --- serial run --------------------------------------------------------------------------------------------------

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
        """All blocks one after the other, each as :meth:`Block.forward`: [batch, sequence, dim] -> the same shape."""
        keys = [draw_key() for _ in range(len(self))] if self.drops else None
        arguments = BatchArguments(lengths, attention_mask, rotation, memory_lengths)
        return self.forward_in_turn(x, arguments, keys, memory=memory)

    def forward_in_turn(
        self,
        x: torch.Tensor,
        arguments: BatchArguments,
        keys: Sequence[int] | None,
        step_sizes: Sequence[float] | None = None,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The blocks one after the other, with dropout keys and factors of the step size, one of each for each row."""
        arguments.check(self.settings, x, memory)
        # The backward of unbind stacks all rows' gradients once; an index's would fill a stack of zeros for each row.
        rows = self.weights().map(lambda p: p.unbind(0))
        for i in range(len(self)):
            h = self.settings.step_size * (step_sizes[i] if step_sizes else 1)
            own_key = [keys[i]] if keys else None
            stacked = None if memory is None else memory[None]
            context = StepContext.of(self.settings, arguments, [self.indices[i]], x.shape, own_key, h, stacked)
            y = differentiable.step(context, rows.map(operator.itemgetter(i)), x)
            if self.watch:
                self.watch(self.indices[i], x, y)
            x = y
        return x

    @property
    def row_names(self) -> frozenset[str]:
        """What parameters of a row are called in state dicts."""
        return frozenset(piece.name for piece in self.pieces)

    # --- state dict, by the names of layers of their own -------------------------------------------------------------

    def save_rows(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for i, n in enumerate(self.indices):
            for piece in self.pieces:
                stacked = getattr(self, piece.field)
                destination[f"{prefix}{n}.{piece.name}"] = piece.kept((stacked if keep_vars else stacked.detach())[i])

    def load_rows(self, state_dict: dict[str, Any], prefix: str, missing: list[str], errors: list[str]) -> None:
        for i, n in enumerate(self.indices):
            for piece in self.pieces:
                row, key = getattr(self, piece.field).detach()[i], f"{prefix}{n}.{piece.name}"
                value = state_dict.get(key)
                if value is None:
                    missing.append(key)
                elif value.shape != piece.view(row).shape:
                    errors.append(f"{key} is {tuple(value.shape)}, here {tuple(piece.view(row).shape)}")
                else:
                    piece.take(row, value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.saved_by_owner:
            self.save_rows(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        if self.saved_by_owner:
            return
        self.load_rows(state_dict, prefix, missing, errors)
        known = {f"{n}.{name}" for n in self.indices for name in self.row_names}
        unexpected.extend(k for k in state_dict if k.startswith(prefix) and k[len(prefix) :] not in known)


def named_rows(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, RowPart | None]]:
    """The parameters by their names where no layers are stacked: (name, parameter, part of it or None for all)."""
    stacks = {path: m for path, m in model.named_modules() if isinstance(m, BlockStack)}
    for name, parameter in model.named_parameters():
        path, _, field = name.rpartition(".")
        if path not in stacks:
            yield name, parameter, None
            continue
        stack = stacks[path]
        outer = path.rpartition(".")[0] if stack.saved_by_owner else path
        for i, n in enumerate(stack.indices):
            for piece in stack.pieces:
                if piece.field == field:
                    yield f"{outer}.{n}.{piece.name}".removeprefix("."), parameter, RowPart(i, piece)
