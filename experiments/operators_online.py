"""Training with each coarse operator's own gradients: does it follow the exact curve?

    mpirun -n 2 python experiments/operators_online.py --settings "exact injection:1,1:4 sum:1,1:8"

The network of setting.py from the same seed and in the same data order for every setting, without switching, or with
``--control`` under error control. Every ``--check`` steps: the loss on held-out text, how the gradient of a batch
compares with the exact one over the layers between the buffers, the convergence factors and the cosine that error
control would have estimated.
"""

from __future__ import annotations

import time

import torch
from setting import arguments, gradient_quality, indicators, trainer_of, write

import mlpint


def main() -> None:
    parser = arguments(__doc__, "operators_online", check=100, control_every=50, control_target=0.95)
    parser.add_argument("--settings", default="exact injection:1,1:4 injection:2,1:4 fitted:2,1:4 sum:1,1:4 sum:1,1:8")
    parser.add_argument("--layout", default="block", choices=("block", "cyclic"))
    parser.add_argument("--control", default="off", choices=("off", "gradient", "residual"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    for setting in args.settings.split():
        trainer = trainer_of(
            setting,
            args,
            comm,
            layout="block" if setting == "exact" else args.layout,
            control="off" if setting == "exact" else args.control,
            control_every=args.control_every,
            control_target=args.control_target if args.control == "gradient" else 0.0,
        )
        training, exact_steps = 0.0, 0
        for step in range(args.steps + 1):
            if step % args.check == 0:
                record = {"setting": setting, "control": args.control, "layers": args.layers, "seed": args.seed}
                record |= {"beta2": args.beta2, "step": step, "val_loss": trainer.validate()["loss"]}
                record |= gradient_quality(trainer) | indicators(trainer)
                record |= {"mode": trainer.mode, "exact_steps": exact_steps, "seconds": training}
                write(args.out, record, comm)
                if comm.rank == 0:
                    numbers = f"val {record['val_loss']:.4f}  cosine {record['cosine']:.4f}  {trainer.mode}"
                    print(f"{setting:16} step {step:5}  {numbers}  {training:.0f} s", flush=True)
            if step < args.steps:
                begun = time.perf_counter()
                trainer.train_step()
                training += time.perf_counter() - begun
                exact_steps += trainer.mode == "exact"
                if trainer.decision is not None and trainer.decision.action not in ("none", "hold") and comm.rank == 0:
                    print(trainer.decision, flush=True)


if __name__ == "__main__":
    main()
