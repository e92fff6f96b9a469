"""What torch.compile makes of a layer-parallel step on the CPU: eager against compiled, in turn, in one process.

    python benchmarks/compiled.py            # half a minute of compiling a row

``stack``: the hand-written steps of a BlockStack for J blocks at once (forward, input part and weight part compiled
apart, so that a gradient for the input alone costs no more than itself). ``step``: forward and backward of a
LayerParallel stack at (1,1), cf 4, over layers of a user's own, compiled one by one. Ratios are eager over compiled:
above 1 compiling pays.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import torch
from block import Block

from mlpint import MGRIT, LayerParallel
from mlpint.nn import BlockStack
from mlpint.nn.block import batched_steps
from mlpint.nn.step_context import StepContext

LLAMA = {"normalization": "rms", "feed_forward": "silu gated", "biases": "none", "positions": "rotary"}


def in_turn(name: str, eager: Callable[[], object], compiled: Callable[[], object], repeats: int) -> None:
    start = time.perf_counter()
    compiled()
    eager()
    compile_seconds = time.perf_counter() - start
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for run, into in zip((eager, compiled), seconds, strict=True):
            start = time.perf_counter()
            run()
            into.append(time.perf_counter() - start)
    middle, low, high = machine.ratio(*seconds)
    print(
        f"{name:34} eager {statistics.median(seconds[0]) * 1e3:7.1f} ms, over compiled {middle:.2f} "
        f"({low:.2f}-{high:.2f}); compiled in {compile_seconds:.0f} s",
        flush=True,
    )


def stack_steps(dim: int, blocks: int, args: argparse.Namespace, **settings: str) -> None:
    stack = BlockStack(blocks, dim, args.heads, **settings)
    module, weights = batched_steps(stack.settings), stack.weights().map(torch.detach)
    x, into = torch.randn(blocks, args.batch * args.sequence, dim), weights.map(torch.empty_like)

    def steps_of(*functions: Callable) -> Callable[[], object]:
        forward, input_part, weight_part = functions

        def run() -> object:
            with torch.no_grad():
                context = StepContext.plain(stack.settings, args.batch, args.sequence)
                out, saved = forward(context, weights, x)
                dx, inner = input_part(context, weights, saved, x)
                weight_part(context, weights, saved, inner, into)
            return out, dx

        return run

    functions = module.forward_train, module.input_vjp, module.weight_vjp
    compiled = (torch.compile(function, dynamic=False) for function in functions)
    kind = "Llama's" if settings else "GPT-2's"
    in_turn(f"stack: d {dim}, {blocks} of {kind} at once", steps_of(*functions), steps_of(*compiled), args.repeats)


def solver_step(dim: int, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    plain = [Block(dim, args.heads, args.layers) for _ in range(args.layers)]
    x = torch.randn(args.batch, args.sequence, dim)

    def step_of(layers: list) -> Callable[[], object]:
        network = LayerParallel(layers, MGRIT(2, 4, 1, 1), open_layers=2, close_layers=2)
        network.looked_after()

        def run() -> object:
            network.zero_grad()
            return network(x).square().mean().backward()

        return run

    compiled = [torch.compile(layer, dynamic=False) for layer in plain]
    in_turn(f"step: d {dim}, {args.layers} layers", step_of(plain), step_of(compiled), args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"layers": 16, "heads": 4, "sequence": 64, "batch": 8, "repeats": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dims", default="64 128 256 512")
    args = parser.parse_args()
    machine.start()
    for dim in map(int, args.dims.split()):
        solver_step(dim, args)
        for settings in ({}, LLAMA):
            stack_steps(dim, 4, args, **settings)


if __name__ == "__main__":
    main()
