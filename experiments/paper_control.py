"""The error control of arXiv 2601.09026 (section 3.2.3), run as it is written, beside ours.

    mpirun -n 2 python experiments/paper_control.py --layers 20 --out experiments/results/paper_control.jsonl

A byte GPT, d 64, (1,1) with injection at cf 4. ``paper``: every so many steps iterations are doubled for a batch; once
the convergence factor of the last one is over 1, training goes on with exact sweeps, to the end. ``paper .9``: the same
at a factor of .9. ``ours``: the gradient against a cosine of .95, up and down the ladder. ``none``: (1,1) to the end;
``serial``: exact from the start. A line every ``--check`` steps: held-out loss, true cosine of the gradient, factors.
"""

from __future__ import annotations

import torch
from setting import arguments, follow, trainer_of

import mlpint
from mlpint import ErrorControl
from mlpint.control.ladder import exact_options
from mlpint.parallel.layer_parallel import LayerParallel

CHEAP = "injection:1,1:4"
FOREVER = 10**6  # checks: it never goes back


def control_of(method: str, blocks: LayerParallel, every: int) -> ErrorControl | None:
    if method == "ours":
        return ErrorControl(blocks, every=every)
    if not method.startswith("paper"):
        return None
    ladder = [blocks.options, exact_options(blocks.options)]
    target = float(method.removeprefix("paper") or 1)
    return ErrorControl(blocks, measure="residual", target=target, every=every, ladder=ladder, patience=FOREVER)


def main() -> None:
    parser = arguments(__doc__, "paper_control", check=100, control_every=50, buffers=0)
    parser.set_defaults(layers=20, beta2=0.95)
    parser.add_argument("--methods", default="serial,none,paper,paper .9,ours")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    for method in args.methods.split(","):
        shape = {"dim": 64, "sequence": 32, "open_layers": args.buffers, "close_layers": args.buffers}
        trainer = trainer_of("exact" if method == "serial" else CHEAP, args, comm, **shape)
        trainer.control = control_of(method, trainer.blocks, args.control_every)
        follow(method, trainer, args, comm, {"method": method, "buffers": args.buffers})


if __name__ == "__main__":
    main()
