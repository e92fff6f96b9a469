"""A batched step of a BlockStack against the loop over the same blocks, on this machine's CPU, one thread.

    python benchmarks/block_stack.py          the aim (d 64, sequence 32, batch 1, J 8), then the sweep
    python benchmarks/block_stack.py --quick  the aim alone

J layers of different intervals take one step each: once by :class:`mlpint.nn.Block`, block after block, with autograd
for the backward; once as LayerParallel takes them from stacked parameters, as many at once as mlpint.nn.batching
says. As in a training step all J are recorded before the first goes back. Both are timed in turn, in processor time,
so that what else runs on the machine counts little; ratios are medians over the turns. Exits with 1 where the aim of
1.8 is missed or a choice is more than 1.05 times slower than the loop.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from machine import describe, ratio

from mlpint.nn import BlockStack, batching, pre_norm
from mlpint.nn.settings import Weights
from mlpint.nn.step_context import StepContext

AIM, LIMIT, CFACTOR = 1.8, 1.05, 4
SWEEP = [
    (16, 8, 8), (32, 32, 16), (64, 32, 2), (64, 32, 32), (64, 128, 8), (64, 512, 4),
    (128, 64, 8), (128, 256, 4), (256, 32, 16), (256, 256, 4), (512, 16, 8), (512, 128, 2), (1024, 8, 4),
]  # fmt: skip


class Case:
    """J blocks of width d at a state of M rows each."""

    def __init__(self, d: int, m: int, j: int) -> None:
        self.d, self.m, self.j = d, m, j
        stack = BlockStack(j * CFACTOR, d, max(2, d // 64))
        self.blocks = stack.to_blocks()[::CFACTOR]
        self.context = StepContext(stack.settings, 1, None, None, 1.0)
        self.x, self.grad = torch.randn(j, m, d), torch.randn(j, m, d)
        self.leaves = [t[None].clone().requires_grad_() for t in self.x]
        gradients = Weights(*(torch.empty_like(p) for p in stack.weights()))
        width = batching.width(j, m, d, self.x.device)
        self.width = width

        def views(of: Weights, start: int) -> Weights:
            return Weights(*(t.detach()[::CFACTOR][start : start + width] for t in of))

        self.parts = [(slice(i, i + width), views(stack.weights(), i), views(gradients, i)) for i in range(0, j, width)]

    def loop_forward(self) -> None:
        with torch.no_grad():
            for block, x in zip(self.blocks, self.x, strict=True):
                block(x[None])

    def batched_forward(self) -> None:
        with torch.no_grad():
            for rows, weights, _ in self.parts:
                pre_norm.forward(self.context, weights, self.x[rows])

    def loop_both(self) -> None:
        outs = [block(x) for block, x in zip(self.blocks, self.leaves, strict=True)]
        for block, x, out, grad in zip(self.blocks, self.leaves, outs, self.grad, strict=True):
            torch.autograd.grad(out, [x, *block.parameters()], grad[None])

    def batched_both(self) -> None:
        with torch.no_grad():
            recorded = [pre_norm.forward_train(self.context, w, self.x[rows])[1] for rows, w, _ in self.parts]
            for (rows, weights, into), saved in zip(self.parts, recorded, strict=True):
                _, inner = pre_norm.input_vjp(self.context, weights, saved, self.grad[rows])
                pre_norm.weight_vjp(self.context, weights, saved, inner, into)


def timed(work: Callable[[], None]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def compare(loop: Callable[[], None], batched: Callable[[], None], seconds: float) -> tuple[float, str]:
    """Loop over batched step, median over the turns; and that with the times and the quartiles as a text."""
    for work in (loop, batched):
        work()
    turns = max(7, min(400, int(seconds / (timed(loop) + timed(batched)))))
    a, b = [], []
    for i in range(turns):
        first, second = (loop, batched) if i % 2 else (batched, loop)
        one, two = timed(first), timed(second)
        a.append(one if i % 2 else two)
        b.append(two if i % 2 else one)
    median, low, high = ratio(a, b)
    microseconds = [1e6 * sorted(t)[turns // 2] for t in (a, b)]
    return median, "{:9.0f} {:9.0f} {:6.2f} ({:.2f}-{:.2f})".format(*microseconds, median, low, high)


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(describe())
    print("   d    M   J at once | forward: loop us, batched us, ratio      | forward + backward")
    missed = []
    for d, m, j in [(64, 32, 8)] + ([] if "--quick" in sys.argv else SWEEP):
        case = Case(d, m, j)
        aim = (d, m, j) == (64, 32, 8)
        texts = []
        for name in ("forward", "both"):
            work = getattr(case, f"loop_{name}"), getattr(case, f"batched_{name}")
            found, text = compare(*work, seconds=3 if aim else 1)
            texts.append(text)
            if found < (AIM if aim else 1 / LIMIT):
                missed.append(f"d {d}, M {m}, J {j}, {name}: {found:.2f}")
        print(f"{d:4} {m:4} {j:3} {case.width:7} | {' | '.join(texts)}", flush=True)
    print("missed: " + "; ".join(missed) if missed else f"aim of {AIM} met; no choice slower than {LIMIT} x the loop")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
