"""What a step of multilevel training takes: fine steps against the same loop without Multilevel, coarse against fine.

    python benchmarks/multilevel.py

One process, one thread; forward, backward and optimiser of the blocks alone, the same modules in turn: a step of the
plain loop before and after each fine phase, then phases of each coarse network. Prints medians of the ratios of
neighbouring steps with their quartiles. Times are the process's own processor time, which others on the machine disturb
less; the ratio of wall-clock times follows. Exit code 1 if a median is above its limit: 1.01 for fine steps, 0.55 for
coarse ones. Entering and leaving phases counts, and so do the copies and averages at the ends of a coarse network's
training, in the steps there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import machine
import torch

from mlpint import MGRIT, LayerParallel, Multilevel
from mlpint.nn import Block, BlockStack

FINE_LIMIT, COARSE_LIMIT = 1.01, 0.55


def blocks_of(kind: str, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind in ("BlockStack", "LayerParallel of a BlockStack"):
        stack = BlockStack(args.layers, args.dim, args.heads)
        return stack if kind == "BlockStack" else LayerParallel(stack, MGRIT(levels=1))
    blocks = torch.nn.Sequential(*(Block(args.dim, args.heads, depth=args.layers) for _ in range(args.layers)))
    return blocks if kind == "Sequential" else LayerParallel(blocks, MGRIT(levels=1))


def timed(work) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - processor, time.perf_counter() - wall


def measure(kind: str, args: argparse.Namespace) -> list[tuple[str, list[float], list[float]]]:
    """Ratios of processor and wall time: fine over plain, coarse over fine."""
    blocks = blocks_of(kind, args)
    optimizer = getattr(torch.optim, args.optimizer)(blocks.parameters(), lr=1e-4)
    multilevel = Multilevel(blocks, optimizer, cycles=10**9, coarse_steps=args.coarse_steps)
    x = torch.randn(args.batch, args.sequence, args.dim)

    def step() -> None:
        y = blocks(x)
        y.backward(y.detach())
        optimizer.step()
        optimizer.zero_grad()

    def inside(phase) -> None:
        with phase:
            step()

    fine_ratios, coarse_ratios = [], []
    fine = (0.0, 0.0)
    end = time.perf_counter() + args.seconds
    for phase in multilevel.schedule(10**9):
        if not phase.fine:
            coarse = timed(lambda phase=phase: inside(phase))
            coarse_ratios.append([c / f for c, f in zip(coarse, fine, strict=True)])
            continue
        before = timed(step)
        fine = timed(lambda phase=phase: inside(phase))
        after = timed(step)
        fine_ratios.append([2 * f / (p + a) for f, p, a in zip(fine, before, after, strict=True)])
        if time.perf_counter() > end and len(fine_ratios) > 10:
            break
    return [
        ("fine step / step without Multilevel", *map(list, zip(*fine_ratios, strict=True))),
        ("coarse step / fine step", *map(list, zip(*coarse_ratios, strict=True))),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 12), ("dim", 256), ("heads", 8), ("sequence", 64), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--coarse-steps", type=int, default=5, help="steps of each coarse network in a cycle")
    parser.add_argument("--optimizer", default="SGD", choices=("SGD", "AdamW"))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kind of blocks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine.describe())
    above = False
    for kind in ("Sequential", "BlockStack", "LayerParallel", "LayerParallel of a BlockStack"):
        limits = (FINE_LIMIT, COARSE_LIMIT)
        for (what, processor, wall), limit in zip(measure(kind, args), limits, strict=True):
            low, middle, high = statistics.quantiles(processor, n=4)
            above |= middle > limit
            print(
                f"{kind}: {what} {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(processor)} steps; wall clock "
                f"{statistics.median(wall):.3f}), limit {limit}"
            )
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
