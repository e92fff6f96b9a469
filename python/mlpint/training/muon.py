"""Muon for the matrices of layers, stacked ones too, and AdamW for all else, behind one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan 2024; arXiv 2502.16982 for the learning rate, which is AdamW's) and torch's AdamW.

    One optimiser, so that checkpoints and :class:`mlpint.Multilevel` find each parameter's state, of its shape, where
    they look for it. Muon orthogonalises the step of one matrix: a parameter with the matrices of several layers is
    stepped row by row.

    Args:
        params: groups; those with ``muon=True`` hold matrices, or stacks of them in three dimensions.
        lr: of both.
        betas: of AdamW.

    Raises:
        RuntimeError: torch has no Muon (it came with 2.9).
        ValueError: parameters of a group with ``muon=True`` that are no matrices.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(f"torch {torch.__version__} has no torch.optim.Muon, which came with 2.9")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0, "muon": False})
        self._rows: dict[torch.Tensor, list[nn.Parameter]] = {}  # of parameters that Muon steps
        for group in self._groups(muon=True):
            for p in group["params"]:
                if p.dim() not in (2, 3):
                    raise ValueError(f"Muon is for matrices and stacks of them, not for a parameter of shape {p.shape}")
                self._rows[p] = [nn.Parameter(row) for row in (p.detach() if p.dim() == 3 else [p.detach()])]

    def _groups(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] is muon]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of what has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self._groups(muon=True):
            self._step_matrices(group)
        others = [
            {**group, "params": [p for p in group["params"] if p.grad is not None]}
            for group in self._groups(muon=False)
        ]
        if any(group["params"] for group in others):
            adamw = torch.optim.AdamW([{k: v for k, v in g.items() if k != "muon"} for g in others])
            adamw.state = self.state
            adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        present = [p for p in group["params"] if p.grad is not None]
        if not present:
            return
        rows = [row for p in present for row in self._rows_of(p)]
        muon = torch.optim.Muon(
            rows, lr=group["lr"], weight_decay=group["weight_decay"], adjust_lr_fn="match_rms_adamw"
        )
        for p in present:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            own = zip(self._rows[p], _as_rows(p.grad), _as_rows(state["momentum_buffer"]), strict=True)
            for row, gradient, momentum in own:
                row.grad = gradient
                muon.state[row]["momentum_buffer"] = momentum  # which Muon moves in place
        muon.step()
        for row in rows:
            row.grad = None

    def _rows_of(self, p: torch.Tensor) -> list[nn.Parameter]:
        """Of what the parameter holds now: checkpoints and moves between devices may have put other memory there."""
        rows = self._rows[p]
        for row, now in zip(rows, _as_rows(p.detach()), strict=True):
            row.data = now
        return rows


def _as_rows(tensor: torch.Tensor | None) -> list[torch.Tensor]:
    assert tensor is not None
    return list(tensor) if tensor.dim() == 3 else [tensor]
