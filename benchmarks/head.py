"""A training step with the head and its loss on all ranks, against the same step with the head shared out.

    mpirun -n 2 python benchmarks/head.py

A GPT of the default size of the vocabulary of GPT-2, tied. Both steps alternate in one run. Prints medians and the
median of the ratios of neighbouring pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import machine
import torch
from block import Block
from torch import nn
from torch.nn import functional as F

import mlpint
from mlpint import MGRIT, LayerParallel


class Net(nn.Module):
    def __init__(self, layers: LayerParallel, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.tokens, self.blocks, self.norm = nn.Embedding(vocabulary, dim), layers, nn.LayerNorm(dim)

    def losses(self, states, wanted):
        return F.cross_entropy(self.norm(states) @ self.tokens.weight.T, wanted, reduction="none")

    def loss(self, tokens, shared: bool):
        states, wanted = self.blocks(self.tokens(tokens)), tokens.roll(-1, 1)
        if shared:
            return mlpint.shard_loss(self.losses, states, wanted, comm=self.blocks.comm)
        return self.losses(states.flatten(0, 1), wanted.flatten()).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"layers": 32, "dim": 256, "heads": 4, "sequence": 64, "batch": 8, "vocabulary": 50257, "repeats": 7}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--settings", default="1,1,4 2,1,4", help="forward,backward iterations,cfactor ...")
    args = parser.parse_args()
    comm = machine.start()
    for setting in args.settings.split():
        forward, backward, cfactor = map(int, setting.split(","))
        torch.manual_seed(0)
        layers = [Block(args.dim, args.heads, args.layers) for _ in range(args.layers)]
        options = MGRIT(cfactor=cfactor, forward_iters=forward, backward_iters=backward)
        net = Net(LayerParallel(layers, options, comm=comm), args.vocabulary, args.dim)
        tokens = torch.randint(args.vocabulary, (args.batch, args.sequence))
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.repeats + 1):
            for shared, times in seconds.items():
                comm.barrier()
                start = time.perf_counter()
                net.loss(tokens, shared).backward()
                comm.barrier()
                times.append(time.perf_counter() - start)
                net.zero_grad()
        whole, shares = (times[1:] for times in seconds.values())  # the first of each warms up
        if comm.rank == 0:
            ratio = statistics.median(w / s for w, s in zip(whole, shares, strict=True))
            print(
                f"({forward},{backward}) cfactor {cfactor}: head on every rank {statistics.median(whole):.3f} s, "
                f"shared out {statistics.median(shares):.3f} s a step, {ratio:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
