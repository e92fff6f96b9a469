"""Coarse operators that are learnt from the fine sweeps.

A coarse step spans the layers of an interval; injection stretches the first of them over it, which is right only while
neighbouring layers do alike. Every sweep over the fine layers shows, for free, what the step should have been: from the
same start u, the first layer's increment f = Phi_0(u) - u and the whole interval's, y = end - u. From decayed sums over
such pairs each interval's owner keeps

- ``scaled``: the number a that minimises the sum of ||y - a f||^2;
- ``fitted``: the matrix W and vector b that minimise that of ||y - W f - b||^2 + ridge (b only forwards: the adjoint is
  linear).

The state itself is no feature: that would ruin the Jacobian of the step, and with it the later iterations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ..state import State

DECAY = 0.97  # of the sums, per observed pass
RIDGE = 1e-3  # relative to the mean diagonal entry
OBSERVE_EVERY = 2  # passes; neighbouring batches say much the same
SOLVE_EVERY = 5  # observations
ROWS = 512  # vectors of a state that enter at most


@dataclasses.dataclass
class _Fit:
    """Decayed normal equations for one tensor of the state in one interval, and their solution."""

    gram: torch.Tensor  # [n, n], features times features
    cross: torch.Tensor  # [n, d], features times targets
    count: int = 0
    solution: torch.Tensor | None = None  # [n, d]
    cast: torch.Tensor | None = None  # the solution in the dtype that products were taken in last

    def solution_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The solution for products in a dtype, cast once."""
        if self.solution is None or self.solution.dtype == dtype:
            return self.solution
        if self.cast is None or self.cast.dtype != dtype:
            self.cast = self.solution.to(dtype)
        return self.cast


class LearntOperator:
    """The coarse steps of one direction on this rank.

    Args:
        kind: ``"scaled"`` or ``"fitted"``.
        affine: whether ``fitted`` has the vector b.

    Attributes:
        precision: the dtype that ``fitted`` takes its products in, set before each pass; None: the state's.
    """

    precision: torch.dtype | None = None

    def __init__(self, kind: str, affine: bool) -> None:
        self.kind, self.affine = kind, affine and kind == "fitted"
        self._fits: dict[tuple[int, int], list[_Fit]] = {}  # (position, length) of the coarse step -> fit per tensor
        self._passes = 0

    def begin_pass(self) -> bool:
        """Whether the pass that begins is to be observed."""
        self._passes += 1
        return self._passes % OBSERVE_EVERY == 1 or self._passes <= SOLVE_EVERY

    # --- the step ----------------------------------------------------------------------------------------------------

    def step(self, position: int, length: int, u: State, v: State) -> State:
        """u -> u + W (v - u) + b; injection where nothing has been learnt yet."""
        fits = self._fits.get((position, length))
        scale = 1.0
        if fits is None:
            # A coarser level's step starts where one of level 1 does: that one, stretched.
            below = [key for key in self._fits if key[0] == position and key[1] < length]
            if below:
                fits, scale = self._fits[below[0]], length / below[0][1]
        moved = []
        for i, (a, b) in enumerate(zip(u.tensors, v.tensors, strict=True)):
            if not a.is_floating_point():
                moved.append(b)
            elif not fits or fits[i].solution is None:
                moved.append(torch.lerp(a, b, length))
            else:
                step = self._apply(fits[i], b - a)
                moved.append((step if scale == 1 else step.mul_(scale)).add_(a))
        return State(moved)

    def pullback(self, position: int, length: int, cotangent: State) -> State:
        """The transposed derivative of :meth:`step` in v, with what has been learnt taken for constant."""
        fits = self._fits.get((position, length))
        pulled = []
        for i, t in enumerate(cotangent.tensors):
            solution = fits[i].solution if fits else None
            if not t.is_floating_point():
                pulled.append(t)
            elif not fits or solution is None:
                pulled.append(t * length)
            elif self.kind == "scaled":
                pulled.append(t * solution.to(t.dtype))
            else:
                matrix = self._matrix(fits[i], t)
                with torch.autocast(t.device.type, enabled=False):
                    pulled.append((t.to(matrix.dtype) @ matrix[: t.shape[-1]].t()).to(t.dtype))
        return State(pulled)

    def _apply(self, fit: _Fit, f: torch.Tensor) -> torch.Tensor:
        if self.kind == "scaled":
            assert fit.solution is not None
            return f * fit.solution.to(f.dtype)
        matrix = self._matrix(fit, f)
        with torch.autocast(f.device.type, enabled=False):
            rows = f.reshape(-1, f.shape[-1]).to(matrix.dtype)
            step = torch.addmm(matrix[-1], rows, matrix[:-1]) if self.affine else rows @ matrix
            return step.view_as(f).to(f.dtype)

    def _matrix(self, fit: _Fit, like: torch.Tensor) -> torch.Tensor:
        """W, and b below it, in the dtype of the products: never wider than the state."""
        narrow = self.precision is not None and self.precision.itemsize < like.dtype.itemsize
        matrix = fit.solution_in(self.precision if self.precision is not None and narrow else like.dtype)
        assert matrix is not None
        return matrix

    # --- learning ----------------------------------------------------------------------------------------------------

    def observe(self, position: int, length: int, u: State, v: State, end: State) -> None:
        """Adds one pair to an interval's normal equations, and solves them now and then."""
        fits = self._fits.setdefault((position, length), [])
        for i, (a, b, c) in enumerate(zip(u.tensors, v.tensors, end.tensors, strict=True)):
            if len(fits) <= i:
                fits.append(self._empty(a))
            if a.is_floating_point():
                self._add(fits[i], b - a, c - a)

    def _empty(self, like: torch.Tensor) -> _Fit:
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
        d = 1 if self.kind == "scaled" else like.shape[-1]
        n = d + self.affine
        return _Fit(
            torch.zeros(n, n, dtype=dtype, device=like.device), torch.zeros(n, d, dtype=dtype, device=like.device)
        )

    @torch.no_grad()
    def _add(self, fit: _Fit, f: torch.Tensor, y: torch.Tensor) -> None:
        width = 1 if self.kind == "scaled" else f.shape[-1]
        f, y = (t.reshape(-1, width).to(fit.gram.dtype) for t in (f, y))
        if self.kind == "fitted":
            stride = -(-len(f) // ROWS)
            f, y = f[::stride], y[::stride]
        size = f.norm()
        # Every pass counts alike, however large its states or gradients; one without a finite size does not count.
        scale = torch.where(size.isfinite() & (size > 0) & y.norm().isfinite(), 1 / size, torch.zeros_like(size))
        f, y = (t.nan_to_num_(0, 0, 0).mul_(scale) for t in (f, y))  # differences that nobody else holds
        if self.affine:
            f = torch.cat([f, scale.expand(len(f), 1)], 1)
        with torch.autocast(f.device.type, enabled=False):
            fit.gram.mul_(DECAY).addmm_(f.t(), f)
            fit.cross.mul_(DECAY).addmm_(f.t(), y)
        fit.count += 1
        if fit.count == 2 or fit.count % SOLVE_EVERY == 0:
            fit.solution, fit.cast = _solve(fit), None

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What has been learnt, by name; the names do not depend on the number of ranks."""
        yield "passes", torch.tensor(self._passes, device="cpu")
        for (position, length), fits in sorted(self._fits.items()):
            for i, fit in enumerate(fits):
                name = f"{position}.{length}.{i}"
                yield f"{name}.gram", fit.gram
                yield f"{name}.cross", fit.cross
                yield f"{name}.count", torch.tensor(fit.count, device="cpu")
                if fit.solution is not None:
                    yield f"{name}.solution", fit.solution

    def load(self, tensors: dict[str, torch.Tensor], owners: Sequence[int], rank: int) -> None:
        """Takes up what :meth:`tensors` gave on all ranks, for the intervals that begin at this rank's positions.

        ``owners`` are the ranks by position.
        """
        self._fits.clear()
        self._passes = int(tensors["passes"])
        for name in sorted(n.removesuffix(".gram") for n in tensors if n.endswith(".gram")):
            position, length, _ = map(int, name.split("."))
            if owners[position] != rank:
                continue
            fit = _Fit(tensors[f"{name}.gram"].clone(), tensors[f"{name}.cross"].clone(), int(tensors[f"{name}.count"]))
            if f"{name}.solution" in tensors:
                fit.solution = tensors[f"{name}.solution"].clone()
            self._fits.setdefault((position, length), []).append(fit)


def _solve(fit: _Fit) -> torch.Tensor | None:
    """Ridge regression by Cholesky; a singular system gets a larger ridge, and None if that does not help either."""
    n = len(fit.gram)
    level = fit.gram.diagonal().mean()
    eye = torch.eye(n, dtype=fit.gram.dtype, device=fit.gram.device)
    for ridge in (RIDGE, 10 * RIDGE, 1000 * RIDGE):
        factor, info = torch.linalg.cholesky_ex(fit.gram + ridge * level * eye)
        if int(info) == 0:
            solution = torch.cholesky_solve(fit.cross, factor)
            if bool(solution.isfinite().all()):
                return solution.contiguous()  # as a checkpoint's: products in another order would differ in rounding
    return None
