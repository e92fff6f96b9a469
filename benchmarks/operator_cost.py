"""What a learnt coarse operator costs beside injection: its steps, what it observes, and the solving of its equations.

    python benchmarks/operator_cost.py

One process, one thread; training passes of the stack under both operators, taken in turn in rounds of ten, in which
the learning goes through all that it does. Prints medians and the median of the ratios of neighbouring rounds. Times
are the process's own processor time. Exit code 1 if ``fitted`` costs more than --limit (0.05: 5% of a step).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import machine
import torch
from block import Block

from mlpint import MGRIT, LayerParallel

SIZES = {128: (4, 24), 256: (4, 16), 512: (8, 16), 768: (12, 8)}  # width -> heads, layers
ROUND = 10  # passes; a multiple of the cycles in which an operator observes and solves


def round_of(blocks: LayerParallel, x: torch.Tensor) -> float:
    started = time.process_time()
    for _ in range(ROUND):
        for p in blocks.parameters():
            p.grad = None
        y = blocks(x.requires_grad_())
        y.backward(y.detach())
    return (time.process_time() - started) / ROUND


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dims", type=int, nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--iterations", default="2,1")
    parser.add_argument("--limit", type=float, default=0.05)
    args = parser.parse_args()
    torch.set_num_threads(1)
    forward, backward = map(int, args.iterations.split(","))
    print(machine.describe())
    above = False
    for dim in args.dims:
        heads, count = SIZES[dim]
        torch.manual_seed(0)
        layers = [Block(dim, heads, count) for _ in range(count)]
        x = torch.randn(8, 64, dim)
        stacks = {
            name: LayerParallel(layers, MGRIT(2, 4, forward, backward, coarse=name))
            for name in ("injection", "scaled", "fitted")
        }
        times: dict[str, list[float]] = {name: [] for name in stacks}
        for i in range(args.rounds + 1):
            for name in stacks if i % 2 else reversed(stacks):
                seconds = round_of(stacks[name], x)
                if i:  # the first round learns from nothing
                    times[name].append(seconds)
        for name in ("scaled", "fitted"):
            middle, low, high = machine.ratio(times[name], times["injection"])
            above |= name == "fitted" and middle > 1 + args.limit
            print(
                f"d {dim}, {count} layers, ({forward},{backward}) cf 4, 512 tokens: injection "
                f"{statistics.median(times['injection']) * 1e3:.1f} ms, {name} "
                f"{statistics.median(times[name]) * 1e3:.1f} ms, {middle:.3f}x (quartiles {low:.3f}-{high:.3f}), "
                f"limit {1 + args.limit:.2f}x",
                flush=True,
            )
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
