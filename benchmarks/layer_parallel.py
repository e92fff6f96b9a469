"""Layer-parallel training step against the plain serial loop over the very same modules.

    mpirun -n 2 python benchmarks/layer_parallel.py

Serial and layer-parallel steps alternate in one run; rank 0 times the serial loop alone while the others wait. Prints
medians and the median of the ratios of neighbouring pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import machine
import torch
from block import Block

from mlpint import MGRIT, LayerParallel
from mlpint.nn import BlockStack


def serial_step(layers, x):
    z = x.clone().requires_grad_()
    for layer in layers:
        z = layer(z)
    z.square().mean().backward()
    for layer in layers:
        layer.zero_grad()


def parallel_step(blocks, x):
    z = blocks(x.clone().requires_grad_())
    z.square().mean().backward()
    blocks.zero_grad()


def measure(comm, layers, blocks, x, repeats):
    serial, parallel = [], []
    for i in range(repeats + 2):
        comm.barrier()
        if comm.rank == 0:
            start = time.perf_counter()
            serial_step(layers, x)
            serial.append(time.perf_counter() - start)
        comm.barrier()
        start = time.perf_counter()
        parallel_step(blocks, x)
        comm.barrier()
        parallel.append(time.perf_counter() - start)
        if i == 1:
            serial.clear()
            parallel.clear()
    return serial, parallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 32), ("dim", 128), ("heads", 4), ("sequence", 64), ("batch", 8), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--settings", default="1,1,4 1,1,8 2,1,4 0,0,4", help="forward,backward iterations,cfactor ...")
    parser.add_argument("--slices", type=int, default=1, help="of the batch, in coarse sweeps from rank to rank")
    parser.add_argument("--coarse", default="injection", help="coarse operator")
    parser.add_argument("--layout", default="block", help="block, or cyclic for --coarse sum")
    parser.add_argument(
        "--stacked", action="store_true", help="an mlpint.nn.BlockStack against the loop over its blocks"
    )
    parser.add_argument("--json", help="append the results to this file")
    args = parser.parse_args()
    comm = machine.start()
    torch.manual_seed(0)
    if args.stacked:
        stack = BlockStack(args.layers, args.dim, args.heads)
        layers, parallel_layers = list(stack.to_blocks()), stack
    else:
        layers = parallel_layers = [Block(args.dim, args.heads, args.layers) for _ in range(args.layers)]
    x = torch.randn(args.batch, args.sequence, args.dim)
    for setting in args.settings.split():
        forward, backward, cfactor = map(int, setting.split(","))
        options = MGRIT(cfactor=cfactor, forward_iters=forward, backward_iters=backward, coarse=args.coarse)
        blocks = LayerParallel(parallel_layers, options, comm=comm, layout=args.layout, chain_slices=args.slices)
        serial, parallel = measure(comm, layers, blocks, x, args.repeats)
        if comm.rank == 0:
            ratio = statistics.median(s / p for s, p in zip(serial, parallel, strict=True))
            s, p = statistics.median(serial), statistics.median(parallel)
            print(
                f"{'stacked ' if args.stacked else ''}({forward},{backward}) cf {cfactor} {args.coarse} slices "
                f"{args.slices} "
                f"on {comm.size} ranks ({comm.name}): serial {s * 1e3:.1f} ms, "
                f"layer-parallel {p * 1e3:.1f} ms, {ratio:.2f}x; waited {blocks.stats.seconds['wait'] * 1e3:.1f} ms",
                flush=True,
            )
            if args.json:
                with open(args.json, "a") as file:
                    times = {"setting": setting, "ranks": comm.size, "serial": serial, "parallel": parallel}
                    file.write(json.dumps(vars(args) | times | {"machine": machine.describe()}) + "\n")


if __name__ == "__main__":
    main()
