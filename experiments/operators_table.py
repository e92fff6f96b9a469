"""How good is the gradient with each coarse operator, on a network that was trained exactly?

    mpirun -n 2 python experiments/operators_table.py

Trains the network of setting.py with exact sweeps, then measures, on one batch, cosine and relative error of the
gradient over the layers between the buffers for every operator, coarsening factor and number of iterations. The
operators that learn see ``--learn`` other batches first, under the iterations they are measured with.
"""

from __future__ import annotations

import torch
from setting import arguments, gradient_quality, options_of, trainer_of, write

import mlpint


def main() -> None:
    parser = arguments(__doc__, "operators_table", learn=30)
    parser.add_argument("--operators", default="injection scaled fitted sum")
    parser.add_argument("--cfactors", default="4 8")
    parser.add_argument("--at", default="1000", help="steps after which to measure, besides the last")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    trainer = trainer_of("exact", args, comm)
    for step in range(1, args.steps + 1):
        loss, _ = trainer.train_step()
        if step % 100 == 0 and comm.rank == 0:
            print(f"step {step} loss {loss:.4f}", flush=True)
        if step == args.steps or str(step) in args.at.split():
            measure(trainer, args, comm)


def measure(trainer: mlpint.training.trainer.Trainer, args, comm: mlpint.Comm) -> None:
    measured = trainer.position
    for cfactor in map(int, args.cfactors.split()):
        for coarse in args.operators.split():
            for iterations in ("1,1", "2,1", "2,2"):
                trainer.blocks.options = options_of(f"{coarse}:{iterations}:{cfactor}")
                trainer.blocks.load_learnt_tensors({})
                for n in range(args.learn if coarse in ("scaled", "fitted") else 0):
                    trainer.forward_backward(trainer.step, 0, measured + 1 + n)
                record = {"coarse": coarse, "cfactor": cfactor, "iterations": iterations, "layers": args.layers}
                record |= {"steps": trainer.step, "beta2": args.beta2, "seed": args.seed}
                record |= gradient_quality(trainer)
                write(args.out, record, comm)
                if comm.rank == 0:
                    print(f"cf {cfactor} {coarse:10} ({iterations}) cosine {record['cosine']:.4f}", flush=True)
    trainer.blocks.options = options_of("exact")


if __name__ == "__main__":
    main()
