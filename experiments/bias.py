"""The bias of (1,1) gradients against their noise, over training, with the consistency term and without.

    python experiments/bias.py --out experiments/results/bias.jsonl  # one process, some minutes

A byte GPT of 20 layers, d 64, trained at (1,1), cf 4, injection, or exactly; at some steps the mean gradient of 32
batches is compared with that of exact sweeps (mlpint.gradient_bias): noise averages out, bias does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import torch

import mlpint
from mlpint.comm.communicator import Comm
from mlpint.training.config import TrainConfig
from mlpint.training.tasks import make
from mlpint.training.trainer import Trainer

NETWORK = {"layers": 20, "dim": 64, "heads": 4, "sequence": 32, "batch": 8, "control": "off", "threads": 1}
RUNS = {
    "exact": {"levels": 1, "consistency": 0.0},
    "injection (1,1), mu 0": {"coarse": "injection", "consistency": 0.0},
    "injection (1,1), mu .1": {"coarse": "injection", "consistency": 0.1},
    "injection (1,1), mu 1": {"coarse": "injection", "consistency": 1.0},
    "sum (1,1)": {"coarse": "sum", "consistency": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--at", type=int, nargs="*", default=[100, 300, 600, 1000])
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/bias.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, keys in RUNS.items():
        config = TrainConfig.of(NETWORK | keys | {"steps": args.steps})
        trainer = Trainer(config, make(config), Comm.of(None))
        for step in range(1, args.steps + 1):
            trainer.train_step()
            if step in args.at:
                judged = mlpint.MGRIT(2, 4, 1, 1, coarse=keys.get("coarse", "injection"))
                with trainer.blocks.using(options=judged):
                    losses = [partial(trainer.training_loss, 0, 0, 10**6 + n) for n in range(args.batches)]
                    found = mlpint.gradient_bias(trainer.blocks, losses)
                record = {"gradients": name, "step": step, "of": str(judged.coarse), **dataclasses.asdict(found)}
                record["val_loss"] = trainer.validate()["loss"]
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}, flush=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
