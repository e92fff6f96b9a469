"""How good is the gradient with each coarse operator, on a network that was trained exactly?

    mpirun -n 2 python experiments/operators_table.py

Trains the network of operators_online.py with exact sweeps, then measures, on one batch, cosine and relative error of
the gradient over the layers between the buffers for every operator, coarsening factor and number of iterations. The
operators that learn see ``--learn`` other batches first, under the iterations they are measured with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from operators_online import SETTING, gradient_quality, options_of

import mlpint
from mlpint import MGRIT
from mlpint.config import TrainConfig
from mlpint.data import load
from mlpint.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("steps", 1000), ("learn", 30), ("layers", 32), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", default="experiments/results/operators_table.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    values = SETTING | {"layers": args.layers, "steps": args.steps, "seed": args.seed, "tied": False}
    trainer = Trainer(TrainConfig.of(values | {"cfactor": 8}), load("", sequence=64), comm)
    trainer.blocks.options = MGRIT(levels=1)
    for step in range(args.steps):
        loss, _ = trainer.train_step()
        if comm.rank == 0 and step % 100 == 0:
            print(f"step {step} loss {loss:.4f}", flush=True)
    measured = trainer.position
    for cfactor in (4, 8):
        for coarse in ("injection", "scaled", "fitted", "sum"):
            for iterations in ("1,1", "2,1", "2,2"):
                trainer.blocks.options = options_of(f"{coarse}:{iterations}:{cfactor}")
                trainer.blocks.load_learnt_tensors({})
                for n in range(args.learn if coarse in ("scaled", "fitted") else 0):
                    trainer.forward_backward(trainer.step, 0, measured + 1 + n)
                record = {"coarse": coarse, "cfactor": cfactor, "iterations": iterations, "steps": args.steps}
                record |= gradient_quality(trainer) | {"ranks": comm.size, "seed": args.seed}
                if comm.rank == 0:
                    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                    with open(args.out, "a") as file:
                        file.write(json.dumps(record) + "\n")
                    print(f"cf {cfactor} {coarse:10} ({iterations}) cosine {record['cosine']:.4f}", flush=True)


if __name__ == "__main__":
    main()
