"""The optimiser of a training run and its learning rate over the steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..nn.stack import named_rows
from .config import OptimizerConfig
from .muon import MuonWithAdamW


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Of the parameters that this rank holds; only matrices decay.

    AdamW (its first beta is 0.9), SGD, or Muon for the layers' matrices with AdamW for all else.

    Raises:
        ConfigError: an optimiser that this torch does not have.
    """
    # Of stacked parameters what counts is one layer's row.
    dims = {p: p.dim() - (part is not None) for _, p, part in named_rows(model) if p.requires_grad}
    matrices = [p for p, dim in dims.items() if dim >= 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p, dim in dims.items() if dim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "muon":
        of_layers = {p for name, p, _ in named_rows(model) if name.startswith("blocks.") and dims.get(p) == 2}
        groups[0]["params"] = [p for p in matrices if p not in of_layers]
        own = [p for p in matrices if p in of_layers]
        groups.append({"params": own, "weight_decay": config.weight_decay, "muon": True})
        try:
            return MuonWithAdamW(groups, lr=config.lr, betas=(0.9, config.beta2))
        except RuntimeError as error:
            raise ConfigError(f"optimizer = 'muon': {error}") from None
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
