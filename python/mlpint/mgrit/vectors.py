"""The vector operations of the solver on states, tensor by tensor."""

from __future__ import annotations

import torch

from ..state import State


def extrapolate(u: State, v: State, length: float) -> State:
    """u + length (v - u), tensor by tensor; integer tensors (masks, indices) are carried over from v."""
    return State(
        torch.lerp(a, b, length) if a.is_floating_point() else b for a, b in zip(u.tensors, v.tensors, strict=True)
    )


def axpy(a: float, x: State, y: State) -> State:
    """a x + y, tensor by tensor; integer tensors are carried over from y."""
    return State(
        torch.add(q, p, alpha=a) if q.is_floating_point() else q for p, q in zip(x.tensors, y.tensors, strict=True)
    )


def squared_norm(x: State) -> float:
    """Sum of squares over all floating-point entries, accumulated in float64."""
    return sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in x.tensors if t.is_floating_point())
