"""Buffer layers and the size of the embeddings: how much of injection's error do they take away?

    python experiments/buffers.py

The network of setting.py without its buffers, trained with the gradients of injection at (1,1), cf 4, with 0, 2 or 4
open and close layers, from embeddings of deviation 0.02 (GPT-2's) or of unit size, and exactly. Every --check steps:
held-out loss, and the cosine with the exact gradient over the layers that are parallel with all of these buffers.
"""

from __future__ import annotations

import torch
from setting import arguments, gradient_quality, trainer_of, write

import mlpint


def main() -> None:
    parser = arguments(__doc__, "buffers", steps=300, check=50)
    parser.add_argument("--settings", default="exact injection:1,1:4")
    parser.add_argument("--buffers", default="0 2 4")
    parser.add_argument("--sizes", default="0.02 1", help="deviations of the embeddings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    for size in map(float, args.sizes.split()):
        for setting in args.settings.split():
            for buffers in args.buffers.split()[: 1 if setting == "exact" else None]:
                one(setting, int(buffers), size, args, comm)


def one(setting: str, buffers: int, size: float, args, comm: mlpint.Comm) -> None:
    trainer = trainer_of(setting, args, comm, open_layers=buffers, close_layers=buffers)
    with torch.no_grad():
        for embedding in (trainer.model.tokens, trainer.model.positions):
            embedding.weight.mul_(size / 0.02)
    for step in range(args.steps + 1):
        if step % args.check == 0:
            record = {"setting": setting, "buffers": buffers, "embedding": size, "layers": args.layers}
            record |= {"seed": args.seed, "step": step, "val_loss": trainer.validate()["loss"]}
            record |= gradient_quality(trainer)
            write(args.out, record, comm)
            if comm.rank == 0:
                numbers = f"val {record['val_loss']:.4f}  cosine {record['cosine']:.4f}"
                print(f"{setting}, {buffers} + {buffers}, {size}: step {step:5}  {numbers}", flush=True)
        if step < args.steps:
            trainer.train_step()


if __name__ == "__main__":
    main()
