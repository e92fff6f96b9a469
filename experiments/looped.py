"""Looped networks under MGRIT: few distinct layers, each run several times, with injection at (1,1) and without.

    python experiments/looped.py --out experiments/results/looped.jsonl  # one process, minutes a run

A byte GPT on the embedded text, d 64, AdamW with betas .9 and .95. ``rows``: each of 8 layers runs 4 times in a row, so
that an interval of 4 is one layer and injection's step, u + 4 F(u), takes it with the right weights. ``rounds``: all 8
run in turn, 4 times over. ``distinct``: 32 layers. ``once``: 8 layers.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import mlpint
from mlpint.training.data import Batches, load
from mlpint.training.models import GPT, Shape

SEQUENCE, BATCH, HELD_OUT, DISTINCT, TIMES = 32, 8, 16, 8, 4
OPTIONS = {"exact": mlpint.MGRIT(levels=1), "injection (1,1) cf 4": mlpint.MGRIT(2, 4, 1, 1)}


def order(kind: str) -> list[int]:
    """The distinct layer that runs at each place."""
    if kind == "rows":
        return [n for n in range(DISTINCT) for _ in range(TIMES)]
    return list(range(DISTINCT)) * (TIMES if kind == "rounds" else 1)


def network(kind: str, vocabulary: int) -> GPT:
    torch.manual_seed(0)
    distinct = kind == "distinct"
    model = GPT(vocabulary, SEQUENCE, Shape(DISTINCT * TIMES if distinct else DISTINCT, 64, 4))
    if not distinct:
        model.blocks = nn.Sequential(*(model.blocks[n] for n in order(kind)))
    return model


def gradient(model: GPT, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
    found = torch.cat([p.grad.double().flatten() for p in model.blocks.parameters()])
    model.zero_grad(set_to_none=True)
    return found


def train(kind: str, setting: str, steps: int, mu: float) -> dict:
    corpus = load("", SEQUENCE)
    batches, model = Batches(corpus, SEQUENCE, BATCH, 0), network(kind, corpus.vocabulary)
    layers = list(model.blocks)
    model.blocks = mlpint.LayerParallel(layers, OPTIONS[setting], consistency=mu)
    model.blocks.looked_after()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        inputs, targets = batches.train(step)
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found, held_out = {}, [batches.validation(i, HELD_OUT) for i in range(HELD_OUT)]
    with model.blocks.using(consistency=0.0):
        for name, options in OPTIONS.items():
            with model.blocks.using(options=options):
                found[name] = gradient(model, held_out[0])
        with model.blocks.using(options=OPTIONS["exact"]), torch.no_grad():
            losses = [float(F.cross_entropy(model(x).flatten(0, 1), y.flatten())) for x, y in held_out]
    cosine = F.cosine_similarity(*found.values(), dim=0) if len(layers) > DISTINCT else None
    return {
        "network": kind,
        "gradients": setting,
        "mu": mu,
        "steps": steps,
        "val_loss": sum(losses) / len(losses),
        "cosine": None if cosine is None else float(cosine),
        "machine": f"{platform.machine()} CPU",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/looped.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cheap = "injection (1,1) cf 4"
    runs = [("rows", "exact", 0), ("rows", cheap, 0), ("rounds", "exact", 0), ("rounds", cheap, 0)]
    runs += [("distinct", "exact", 0), ("distinct", cheap, 0), ("once", "exact", 0), ("rows", cheap, 1)]
    for kind, setting, mu in runs:
        record = train(kind, setting, args.steps, mu)
        print(record, flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
