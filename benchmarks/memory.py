"""Peak memory of each rank against that of the serial network, for training steps with AdamW.

    mpirun -n 2 python benchmarks/memory.py
    mpirun -n 2 python benchmarks/memory.py --dim 256 --batch 16

The serial network is a fresh process that rank 0 starts before any rank builds anything. Each process first takes a
step with a tiny network, so that code and libraries loaded on first use count for neither. Then it builds its network
and trains it; a figure is the peak of resident memory over what the process held before building: parameters,
gradients, optimiser state, activations, messages and whatever the allocator did not give back.

Two peaks: while training, and while building. The ranks make their own layers alone (mlpint.LayerFactory); with --whole
LayerParallel is handed all layers and keeps its own, so that building peaks at the whole network's parameters on every
rank, as in any script that creates the model before it is spread. Exit code 1 if a rank's peak while training is above
--limit times the serial network's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys

import machine
import torch
from block import Block

MIB = 2.0**20


def status(field: str) -> int:
    """Bytes: VmRSS is resident now, VmHWM its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def settle() -> int:
    """Gives back what nobody holds, starts the peak anew, and returns what is resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # Where a sandbox forbids this, the peak is the process's own; it is reached while training all the same.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status("VmRSS")


def train(stack, batch, sequence, dim, steps):
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(batch, sequence, dim, generator=generator).requires_grad_()
        stack(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(wrap, args) -> dict[str, float]:
    """Peaks over the resident memory before, in bytes.

    wrap: the stack of so many layers, and what makes one of them.
    """
    torch.manual_seed(0)
    train(wrap(8, lambda n: Block(8, 1, 1)), 2, 4, 8, steps=2)
    before = settle()
    stack = wrap(args.layers, lambda n: Block(args.dim, args.heads, args.layers))
    building = status("VmHWM") - before
    built = settle() - before
    train(stack, args.batch, args.sequence, args.dim, args.steps)
    return {"training": status("VmHWM") - before, "building": building, "built": built, "before": before}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 32), ("dim", 128), ("heads", 4), ("sequence", 64), ("batch", 8), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--setting", default="2,1,4", help="forward iterations, backward iterations, cfactor")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--whole", action="store_true", help="make all layers on every rank")
    parser.add_argument("--limit", type=float, default=0.6)
    parser.add_argument("--serial", action="store_true", help="measure the serial network in this process, print JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.serial:
        print(json.dumps(measure(lambda count, make: torch.nn.Sequential(*map(make, range(count))), args)))
        return 0

    import mlpint
    from mlpint import MGRIT, LayerParallel

    comm = mlpint.init()
    serial = {}
    if comm.rank == 0:
        command = [sys.executable, *sys.argv, "--serial"]
        serial = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    comm.barrier()
    forward, backward, cfactor = map(int, args.setting.split(","))
    options = MGRIT(cfactor=cfactor, forward_iters=forward, backward_iters=backward)

    def wrap(count, make):
        layers = list(map(make, range(count))) if args.whole else mlpint.LayerFactory(count, make)
        return LayerParallel(layers, options, comm=comm, recompute=args.recompute)

    own = measure(wrap, args)
    ranks = [json.loads(m) for m in comm.gather(json.dumps(own).encode())]
    worst = max(r["training"] for r in ranks) if comm.rank == 0 else 0.0
    if comm.rank == 0:
        print(machine.describe())
        print(
            f"{args.layers} layers, d {args.dim}, sequence {args.sequence}, batch {args.batch}, AdamW, "
            f"({forward},{backward}) cf {cfactor} on {comm.size} ranks ({comm.name}); MiB over the process before"
        )
        for name, peaks in [("serial", serial), *((f"rank {r}", p) for r, p in enumerate(ranks))]:
            training, building, built, before = (peaks[k] / MIB for k in ("training", "building", "built", "before"))
            print(
                f"{name}: peak while training {training:.1f} ({peaks['training'] / serial['training']:.2f}x serial), "
                f"while building {building:.1f} ({building / built:.2f}x the {built:.1f} kept); before {before:.0f}"
            )
        return int(worst > args.limit * serial["training"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
