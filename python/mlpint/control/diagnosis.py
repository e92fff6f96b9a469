"""Where numbers stop being finite: the first such layer, found by going through the batch once more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..parallel.layer_parallel import LayerParallel
from .ladder import exact_options
from .rehearsal import Rehearsal

_SHOWN = 4


def first_not_finite(rehearsal: Rehearsal) -> str:
    """A clause that names the first layer whose state is not finite, the same on every rank. Collective."""
    blocks = rehearsal.blocks
    exact = exact_options(blocks.options)
    here: dict[int, str] = {}  # what is not finite at own layers

    def look(n: int, kind: str, parameters: Iterable[torch.Tensor], inputs: Any, output: Any) -> None:
        where = f"layer {n} ({kind}, rank {blocks.comm.rank})"
        if not _all_finite(pytree.tree_leaves(inputs)):
            here.setdefault(n, f"the state before {where} is not finite")
        elif not _all_finite(pytree.tree_leaves(output)):
            weights = "" if _all_finite(parameters) else ", and neither are its weights"
            here.setdefault(n, f"the state after {where} is not finite{weights}")

    with rehearsal.under(exact), blocks.store.watched(look), torch.no_grad():
        loss = rehearsal.again()
    reports = _gathered(rehearsal, here)
    if reports:
        return reports[min(reports)]
    if not _all_finite([loss]):
        return "the states of all layers are finite, the loss is not"
    gradients = rehearsal.gradients(exact).by_layer
    here = {
        n: f"all states are finite; the gradient of layer {n} (rank {blocks.comm.rank}) is not"
        for n, own in gradients.items()
        if not _all_finite(g for g in own if g is not None)
    }
    reports = _gathered(rehearsal, here)
    return reports[max(reports)] if reports else "computed again, all states, the loss and the gradients are finite"


def gradients_not_finite(blocks: LayerParallel) -> str:
    """A clause that names the layers whose gradients, as they are, are not finite; empty if there are none. Collective.

    A fault that hits one layer's gradient once is not there when the batch is computed again.
    """
    own = [n for n, grads in blocks.store.gradients(set()).items() if not _all_finite(grads)]
    named = [
        (n, rank)
        for rank, message in enumerate(blocks.comm.gather(json.dumps(own).encode()))
        for n in json.loads(message)
    ]
    if not named:
        return ""
    some = ", ".join(f"{n} (rank {rank})" for n, rank in sorted(named)[:_SHOWN])
    return f"the gradients of {len(named)} of {len(blocks)} layers are not finite: {some}" + (
        ", ..." if len(named) > _SHOWN else ""
    )


def _gathered(rehearsal: Rehearsal, own: dict[int, str]) -> dict[int, str]:
    messages = rehearsal.blocks.comm.gather(json.dumps(list(own.items())).encode())
    return {n: text for message in messages for n, text in json.loads(message)}


def _all_finite(values: Iterable[Any]) -> bool:
    return all(bool(t.isfinite().all()) for t in values if isinstance(t, torch.Tensor) and t.is_floating_point())
