"""What the parameters of one row of a stack are called in state dicts, and how they lie in it."""

from __future__ import annotations

import dataclasses

import torch

from .settings import NAMES, Weights


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of a state dict, made of a part of one row.

    Attributes:
        name: its name in the layer.
        field: the one of :class:`mlpint.nn.settings.Weights` that it is a part of.
        rows: first and last (exclusive) of the field's first dimension; None: all of it.
        transposed: whether a matrix is kept as [in, out].
        less: what the values kept are less by.
    """

    name: str
    field: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    less: float = 0.0

    def view(self, row: torch.Tensor) -> torch.Tensor:
        """The part of a field's row, laid out as it is kept."""
        part = row if self.rows is None else row[slice(*self.rows)]
        return part.t() if self.transposed else part

    def kept(self, row: torch.Tensor) -> torch.Tensor:
        """What is kept; a view of the row where nothing is to be computed."""
        return self.view(row) - self.less if self.less else self.view(row)

    @torch.no_grad()
    def take(self, row: torch.Tensor, kept: torch.Tensor) -> None:
        """Puts into a row what is kept."""
        self.view(row).copy_(kept + self.less if self.less else kept)


@dataclasses.dataclass(frozen=True)
class RowPart:
    """Where a layer's own tensor lies in a stacked one: of the parameter, of its gradient, of an optimiser's state."""

    row: int
    piece: Piece

    def __call__(self, stacked: torch.Tensor) -> torch.Tensor:
        """The view."""
        return self.piece.view(stacked[self.row])


def own_pieces(present: Weights[object]) -> tuple[Piece, ...]:
    """Those of an unstacked :class:`mlpint.nn.Block`, of the parameters that there are."""
    fields = zip(NAMES, Weights._fields, present, strict=True)
    return tuple(Piece(name, field) for name, field, p in fields if p is not None)
