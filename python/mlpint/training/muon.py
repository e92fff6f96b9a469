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
                self._rows[p] = [nn.Parameter(row) for row in _as_rows(p.detach())]
        rows = [[row for p in group["params"] for row in self._rows[p]] for group in self._groups(muon=True)]
        self._muon = torch.optim.Muon([{"params": own} for own in rows], adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(self._groups(muon=False))  # which puts its defaults into these very groups

    def _groups(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] is muon]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of what has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_matrices()
        # Loading a state puts other objects here.
        self._adamw.param_groups, self._adamw.state = self._groups(muon=False), self.state
        self._adamw.step()
        return loss

    def _step_matrices(self) -> None:
        for group, own in zip(self._groups(muon=True), self._muon.param_groups, strict=True):
            own["lr"], own["weight_decay"] = group["lr"], group["weight_decay"]
        for p, rows in self._rows.items():
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            # Of what the parameter holds now: checkpoints and moves between devices may have put other memory there.
            parts = (_as_rows(t) for t in (p.detach(), p.grad, state["momentum_buffer"]))
            for row, now, gradient, momentum in zip(rows, *parts, strict=True):
                row.data, row.grad = now, gradient
                self._muon.state[row]["momentum_buffer"] = momentum  # which Muon moves in place
        self._muon.step()
        self._muon.zero_grad()


def _as_rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor) if tensor.dim() == 3 else [tensor]
