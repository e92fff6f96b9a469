"""What the consistency term costs: forward and backward at (1,1), cf 4, with it against without it, in turn.

    mpirun -n 2 python benchmarks/consistency.py

For layers that autograd differentiates, for blocks whose backward comes in two halves, and for these stacked. Prints
medians and the median of the ratios of neighbouring pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import machine
import torch
from block import Block

from mlpint import MGRIT, LayerParallel
from mlpint.nn import BlockStack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"layers": 32, "dim": 128, "heads": 4, "sequence": 64, "batch": 8, "repeats": 25}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    comm = machine.start()
    torch.manual_seed(0)
    stack = BlockStack(args.layers, args.dim, args.heads)
    x = torch.randn(args.batch, args.sequence, args.dim)
    plain = [Block(args.dim, args.heads, args.layers) for _ in range(args.layers)]
    for kind, layers in (("plain", plain), ("two halves", stack.to_blocks()), ("stacked", stack)):
        network = LayerParallel(layers, MGRIT(2, 4, 1, 1), comm=comm, open_layers=2, close_layers=2)
        network.looked_after()
        seconds: dict[float, list[float]] = {0.0: [], 1.0: []}
        for turn in range(args.repeats + 1):
            for mu in (0.0, 1.0) if turn % 2 else (1.0, 0.0):
                network.consistency = mu
                comm.barrier()
                start = time.perf_counter()
                network(x).square().mean().backward()
                comm.barrier()
                seconds[mu].append(time.perf_counter() - start)
                network.zero_grad()
        without, term = (times[1:] for times in seconds.values())  # the first of each warms up
        if comm.rank == 0:
            middle, low, high = machine.ratio(term, without)
            print(
                f"{kind}: without {statistics.median(without):.4f} s, with the term "
                f"{statistics.median(term):.4f} s, {middle:.3f} ({low:.3f}-{high:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
