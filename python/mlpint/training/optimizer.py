"""The optimiser of a training run and its learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..nn.stack import named_rows
from .config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (its first beta is 0.9) or SGD over the parameters that this rank holds; only matrices decay."""
    # Of stacked parameters what counts is one layer's row.
    matrices = {p: p.dim() - (row is not None) >= 2 for _, p, row in named_rows(model) if p.requires_grad}
    groups = [
        {"params": [p for p, is_matrix in matrices.items() if is_matrix], "weight_decay": config.weight_decay},
        {"params": [p for p, is_matrix in matrices.items() if not is_matrix], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate in step 0, 1, ..., steps - 1: a linear warm-up, then down to ``final_lr`` times ``lr``.

    By half a cosine, or along a line over the last ``decay`` of the steps (warm-up, stable, decay; arXiv 2404.06395).
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    low = config.final_lr * config.lr
    if config.schedule == "wsd":
        left = (steps - 1 - step) / max(config.decay * steps, 1)
        return low + (config.lr - low) * min(left, 1.0)
    progress = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
