"""Training with each coarse operator's own gradients and no switching: does it follow the exact curve?

    mpirun -n 2 python experiments/operators_online.py --settings "exact injection:1,1:4 sum:1,1:8"

A 32-layer byte GPT (d 128, 4 heads, sequence 64, batch 8, AdamW at 1e-3, 4 + 4 buffer layers) on the text that Python
carries, from the same seed and in the same data order for every setting, written operator:forward,backward:cfactor.
Every ``--check`` steps: the loss on held-out text, and how the gradient of a batch compares with the exact one over the
layers between the buffers. One JSON object a line goes to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

import mlpint
from mlpint import MGRIT
from mlpint.compare import exact
from mlpint.config import TrainConfig
from mlpint.data import load
from mlpint.trainer import Trainer

BUFFERS = 4
SETTING = {"open_layers": BUFFERS, "close_layers": BUFFERS, "warmup": 50, "final_lr": 1.0, "weight_decay": 0.01}


def options_of(text: str) -> MGRIT:
    if text == "exact":
        return MGRIT(levels=1)
    coarse, iterations, cfactor = text.split(":")
    forward, backward = map(int, iterations.split(","))
    return MGRIT(2, int(cfactor), forward, backward, coarse=coarse)


def gradient_quality(trainer: Trainer) -> dict[str, float]:
    """Cosine and relative error of the gradient over the layers between the buffers, on the next batch."""
    sides = []
    for way in ("own", "exact"):
        trainer.model.zero_grad(set_to_none=True)
        if way == "own":
            trainer.forward_backward(trainer.step, 0, trainer.position)
        else:
            with exact(trainer.blocks):
                trainer.forward_backward(trainer.step, 0, trainer.position)
        middle = range(BUFFERS, trainer.blocks.layer_count - BUFFERS)
        layers = [layer for n, layer in trainer.blocks.local_layers.items() if n in middle]
        sides.append([p.grad.double().flatten() for layer in layers for p in layer.parameters()])
    trainer.model.zero_grad(set_to_none=True)
    sums = torch.zeros(4, dtype=torch.float64)
    for a, b in zip(*sides, strict=True):
        sums += torch.stack([a @ a, b @ b, a @ b, (a - b) @ (a - b)])
    trainer.comm.sum_ordered([sums])
    aa, bb, ab, dd = sums.tolist()
    return {"cosine": ab / (aa * bb) ** 0.5, "error": (dd / bb) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", default="exact injection:1,1:4 injection:2,1:4 fitted:2,1:4 sum:1,1:4 sum:1,1:8")
    parser.add_argument("--layout", default="block", choices=("block", "cyclic"))
    for name, value in (("steps", 1000), ("check", 100), ("layers", 32), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", default="experiments/results/operators_online.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    corpus = load("", sequence=64)
    for setting in args.settings.split():
        values = SETTING | {"layers": args.layers, "steps": args.steps, "seed": args.seed, "tied": False}
        values |= {"cfactor": options_of(setting).cfactor, "eval_batches": 16, "sample": 0, "compare": 0}
        trainer = Trainer(TrainConfig.of(values), corpus, comm)
        trainer.blocks.options = options_of(setting)
        started = time.perf_counter()
        training = 0.0
        for step in range(args.steps + 1):
            if step % args.check == 0:
                record = {"setting": setting, "seed": args.seed, "step": step, "val_loss": trainer.validate()}
                record |= gradient_quality(trainer) | {"seconds": training}
                if comm.rank == 0:
                    machine = {"ranks": comm.size, "machine": f"{platform.machine()} CPU", "torch": torch.__version__}
                    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                    with open(args.out, "a") as file:
                        file.write(json.dumps(record | machine) + "\n")
                    numbers = f"val {record['val_loss']:.4f}  cosine {record['cosine']:.4f}"
                    print(f"{setting:16} step {step:5}  {numbers}  {time.perf_counter() - started:.0f} s", flush=True)
            if step < args.steps:
                begun = time.perf_counter()
                trainer.train_step()
                training += time.perf_counter() - begun


if __name__ == "__main__":
    main()
