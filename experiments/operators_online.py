"""Training with each coarse operator's own gradients: does it follow the exact curve?

    mpirun -n 2 python experiments/operators_online.py --settings "exact injection:1,1:4 sum:1,1:8"

The network of setting.py from the same seed and in the same data order for every setting, without switching, or with
``--control`` under error control. Every ``--check`` steps: the loss on held-out text, how the gradient of a batch
compares with the exact one over the layers between the buffers, the convergence factors and the cosine that error
control would have estimated.
"""

from __future__ import annotations

import torch
from setting import arguments, follow, trainer_of

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
        follow(setting, trainer, args, comm, {"setting": setting, "control": args.control})


if __name__ == "__main__":
    main()
