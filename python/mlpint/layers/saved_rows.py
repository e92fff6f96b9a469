"""Tensors kept by row, with the leading dimension they were computed with."""

from __future__ import annotations

import torch

Tensors = tuple[torch.Tensor, ...]


class SavedRows:
    """What steps of several layers at once leave for later, found again for any other grouping of the layers.

    Rows that are asked for as they were put, or as an evenly spaced part of that, come as views. Only rows from several
    batches (those that the serial chain evaluated one by one) are brought together by a copy.
    """

    def __init__(self) -> None:
        self._at: dict[int, tuple[Tensors, int]] = {}  # row -> its batch and its place in there

    def put(self, rows: range, tensors: Tensors) -> None:
        for i, row in enumerate(rows):
            self._at[row] = tensors, i

    def get(self, rows: range) -> Tensors:
        tensors, start = self._at[rows[0]]
        if len(rows) == 1:
            return tensors if len(tensors[0]) == 1 else tuple(t[start : start + 1] for t in tensors)
        places = [self._at[row] for row in rows]
        step = places[1][1] - start
        if step > 0 and all(batch is tensors and at == start + i * step for i, (batch, at) in enumerate(places)):
            if step == 1 and len(rows) == len(tensors[0]):
                return tensors
            return tuple(t[start : places[-1][1] + 1 : step] for t in tensors)
        return tuple(torch.cat([batch[k][at : at + 1] for batch, at in places]) for k in range(len(tensors)))

    def drop(self, rows: range) -> None:
        """Frees a batch when the last of its rows is dropped."""
        for row in rows:
            self._at.pop(row, None)
