"""All that the coarse operators of a stack have learnt on this rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .layout import Layout
from .learnt_operator import LearntOperator
from .options import MGRIT

LEARNT = ("scaled", "fitted")


class LearntOperators:
    """Learnt coarse operators by layout, direction and kind, made when they are first needed.

    Args:
        rank: of this process.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._operators: dict[tuple[Layout, str, str], LearntOperator] = {}

    def operator(
        self, layout: Layout, options: MGRIT, direction: str, precision: torch.dtype | None = None
    ) -> LearntOperator | None:
        """The coarse operator of these options; None where it learns nothing.

        Args:
            precision: the dtype that the layers of the pass take products in, where that is not the state's.
        """
        if options.coarse not in LEARNT:
            return None
        key = (layout, direction, options.coarse)
        if key not in self._operators:
            self._operators[key] = LearntOperator(options.coarse, affine=direction == "forward")
        self._operators[key].precision = precision
        return self._operators[key]

    def tensors(self, layout: Layout) -> dict[str, torch.Tensor]:
        """What has been learnt on the layers of a layout, by names that do not depend on the number of ranks."""
        return {
            f"{direction}.{kind}.{name}": tensor
            for (learnt_on, direction, kind), operator in self._operators.items()
            if learnt_on == layout
            for name, tensor in operator.tensors()
        }

    def load(self, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes up what :meth:`tensors` gave on all ranks, in place of what was learnt on the layers of a layout."""
        operators = {key: operator for key, operator in self._operators.items() if key[0] != layout}
        for direction, kind in {tuple(name.split(".")[:2]) for name in tensors}:
            prefix = f"{direction}.{kind}."
            owners = layout.owners if direction == "forward" else layout.owners[::-1]
            operator = operators[layout, direction, kind] = LearntOperator(kind, affine=direction == "forward")
            named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            operator.load(named, owners, self._rank)
        self._operators = operators
