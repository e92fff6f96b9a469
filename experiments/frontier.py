"""Accuracy against critical path: what a user chooses between, at several depths.

    python experiments/frontier.py --depths "16 32 64 128"

Trains the network of setting.py exactly, ``--layers`` layers between the buffers and 300 steps, then measures on one
batch, for every operator, number of iterations and coarsening factor, the cosine of the gradient over those layers.
Beside it stands the speed-up of a training step on ``--ranks`` ranks as benchmarks/critical_path.py counts it (the
``sum`` operator in the cyclic layout where it is defined, (1,1); elsewhere in the block layout).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from setting import BUFFERS, OPERATORS, arguments, gradient_quality, options_of, trainer_of, write

import mlpint
from mlpint import MGRIT
from mlpint.layers.module_evaluator import ModuleEvaluator

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import critical_path  # noqa: E402

ITERATIONS = ("1,1", "2,1", "2,2")


def speed_up(depth: int, ranks: int, options: MGRIT) -> float:
    """Serial units over units of the critical path."""
    group = min(ranks, options.cfactor)
    layout = "cyclic" if options.coarse == "sum" and ranks % group == options.cfactor % group == 0 else "block"
    kept = ModuleEvaluator._counter
    ModuleEvaluator._counter = critical_path.counted
    try:
        return 3 * depth / critical_path.step_units(depth, ranks, options, layout)
    finally:
        ModuleEvaluator._counter = kept


def main() -> None:
    parser = arguments(__doc__, "frontier", steps=300, learn=10, ranks=8)
    parser.add_argument("--depths", default="16 32 64 128", help="layers between the buffers")
    parser.add_argument("--cfactors", default="2 4 8 16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    for depth in map(int, args.depths.split()):
        args.layers = depth + 2 * BUFFERS
        trainer = trainer_of("exact", args, comm)
        for _ in range(args.steps):
            loss, _ = trainer.train_step()
        for cfactor in map(int, args.cfactors.split()):
            for coarse in OPERATORS:
                for iterations in ITERATIONS:
                    options = options_of(f"{coarse}:{iterations}:{cfactor}")
                    trainer.blocks.options = options
                    trainer.blocks.load_learnt_tensors({})
                    for n in range(args.learn if coarse in ("scaled", "fitted") else 0):
                        trainer.forward_backward(trainer.step, 0, trainer.position + 1 + n)
                    record = {"depth": depth, "coarse": coarse, "iterations": iterations, "cfactor": cfactor}
                    record |= {"steps": args.steps, "seed": args.seed, "beta2": args.beta2, "loss": loss}
                    record |= gradient_quality(trainer)
                    record |= {"counted_ranks": args.ranks, "speed_up": speed_up(depth, args.ranks, options)}
                    write(args.out, record, comm)
                    if comm.rank == 0:
                        numbers = f"cosine {record['cosine']:.4f}  speed-up {record['speed_up']:.2f}"
                        print(f"depth {depth} {coarse:10} ({iterations}) cf {cfactor:<3} {numbers}", flush=True)


if __name__ == "__main__":
    main()
