"""What wrapping costs where nothing is gained: LayerParallel alone, with exact sweeps, against the plain loop.

    python benchmarks/exact_overhead.py

One process, one thread; forward and backward of the same modules, taken in turn and in changing order. Prints medians
and the median of the ratios of neighbouring steps with its quartiles: without arguments, and with a tensor that goes to
every layer as a keyword argument. Times are the process's own processor time, which others on the machine disturb less
(nothing here waits); the ratio of wall-clock times follows. Exit code 1 if a median is above --limit times the loop (by
default 1.03, and 1.2 for the small size, where Python is most of it).
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

SIZES = {"d 128, sequence 64, batch 8": (128, 64, 8, 1.03), "d 32, sequence 16, batch 1": (32, 16, 1, 1.2)}


class Shifted(Block):
    """A block that takes a keyword argument."""

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if shift is None else x + shift)


def step(forward, modules, x, kwargs):
    for p in modules.parameters():
        p.grad = None
    x = x.clone().requires_grad_()
    wall, processor = time.perf_counter(), time.process_time()
    y = forward(x, **kwargs)
    y.backward(y.detach())
    return time.process_time() - processor, time.perf_counter() - wall


def compare(layers, x, kwargs, repeats):
    def loop(z, **kwargs):
        for layer in layers:
            z = layer(z, **kwargs)
        return z

    modules = torch.nn.ModuleList(layers)
    blocks = LayerParallel(layers, MGRIT(forward_iters=0, backward_iters=0))
    times = {loop: [], blocks: []}
    for i in range(repeats + 3):
        for forward in (loop, blocks) if i % 2 else (blocks, loop):
            seconds = step(forward, modules, x, kwargs)
            if i >= 3:
                times[forward].append(seconds)
    return [*zip(*times[loop], strict=True)], [*zip(*times[blocks], strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each comparison")
    parser.add_argument("--limit", type=float, help="one limit for all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine.describe())
    above = False
    for name, (dim, sequence, batch, limit) in SIZES.items():
        limit = args.limit or limit
        torch.manual_seed(0)
        layers = [Shifted(dim, args.heads, args.layers) for _ in range(args.layers)]
        x = torch.randn(batch, sequence, dim)
        for what, kwargs in (("no arguments", {}), ("keyword tensor", {"shift": 0.01 * torch.randn(dim)})):
            (_, serial), (_, parallel) = compare(layers, x, kwargs, 3)
            repeats = max(10, int(args.seconds / (statistics.median(serial) + statistics.median(parallel))))
            (serial, serial_wall), (parallel, parallel_wall) = compare(layers, x, kwargs, repeats)
            middle, low, high = machine.ratio(parallel, serial)
            wall, *_ = machine.ratio(parallel_wall, serial_wall)
            above |= middle > limit
            print(
                f"{args.layers} layers, {name}, {what}: loop {statistics.median(serial) * 1e3:.2f} ms, "
                f"LayerParallel {statistics.median(parallel) * 1e3:.2f} ms, {middle:.3f}x "
                f"(quartiles {low:.3f}-{high:.3f}, {repeats} steps; wall {wall:.3f}x), limit {limit}x",
                flush=True,
            )
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
