"""torch's pipeline (1F1B) and layer-parallel training on the very same layers, in one run.

    mpirun -n 2 python benchmarks/pipeline_peer.py

Both spread the layers over the ranks; the pipeline cuts the batch into microbatches and is exact. The serial loop on
rank 0, the pipelines and the layer-parallel settings take turns; the pipeline sends over gloo, mlpint over MPI. Prints
medians, and the median ratio of neighbouring steps to the fastest pipeline.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time

import machine
import torch
import torch.distributed as dist
from block import Block
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import mlpint
from mlpint import MGRIT, LayerParallel


def loss_of(y: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
    return y.square().mean()


def pipeline(comm, layers, x, microbatches):
    """A step of 1F1B; the ranks hold as many layers each."""
    count = len(layers) // comm.size
    own = nn.Sequential(*copy.deepcopy(layers[comm.rank * count : (comm.rank + 1) * count]))
    stage = PipelineStage(own, comm.rank, comm.size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, microbatches, loss_fn=loss_of)
    last = comm.rank == comm.size - 1

    def step():
        if comm.rank == 0:
            schedule.step(x)
        else:
            schedule.step(**({"target": x} if last else {}))
        own.zero_grad()

    return step


def layer_parallel(comm, layers, x, options, slices):
    stack = LayerParallel(copy.deepcopy(layers), options, comm=comm, chain_slices=slices)

    def step():
        loss_of(stack(x)).backward()
        stack.zero_grad()

    return step


def serial(comm, layers, x):
    def step():
        if comm.rank == 0:
            y = x
            for layer in layers:
                y = layer(y)
            loss_of(y).backward()
            for layer in layers:
                layer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 32), ("dim", 128), ("heads", 4), ("sequence", 64), ("batch", 8), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    settings = "1,1,4,1 1,1,4,2 1,1,8,1 1,1,8,2 2,1,4,1 2,1,4,2"
    parser.add_argument("--settings", default=settings, help="forward,backward iterations,cfactor,slices ...")
    parser.add_argument("--microbatches", default="2 4 8")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    file = comm.gather(tempfile.mktemp().encode())[0].decode()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=comm.rank, world_size=comm.size)
    torch.manual_seed(0)
    layers = [Block(args.dim, args.heads, args.layers) for _ in range(args.layers)]
    x = torch.randn(args.batch, args.sequence, args.dim)
    steps = {"serial": serial(comm, layers, x)}
    pipelines = {f"1F1B, {m} microbatches": pipeline(comm, layers, x, m) for m in map(int, args.microbatches.split())}
    steps |= pipelines
    for setting in args.settings.split():
        forward, backward, cfactor, slices = map(int, setting.split(","))
        options = MGRIT(cfactor=cfactor, forward_iters=forward, backward_iters=backward)
        name = f"mlpint ({forward},{backward}) cf {cfactor}, {slices} slices"
        steps[name] = layer_parallel(comm, layers, x, options, slices)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats + 2):
        for name, step in steps.items():
            comm.barrier()
            start = time.perf_counter()
            step()
            comm.barrier()
            seconds[name].append(time.perf_counter() - start)
    if comm.rank == 0:
        seconds = {name: times[2:] for name, times in seconds.items()}  # the first two warm up
        best = min(pipelines, key=lambda name: statistics.median(seconds[name]))
        print(machine.describe(), f"{comm.size} ranks, the fastest pipeline: {best}", sep="\n")
        for name, times in seconds.items():
            to_serial, to_best = (
                statistics.median(a / b for a, b in zip(seconds[peer], times, strict=True)) for peer in ("serial", best)
            )
            print(
                f"{name:<28} {statistics.median(times) * 1e3:7.1f} ms   {to_serial:.2f}x serial   "
                f"{to_best:.2f}x the pipeline"
            )
    time.sleep(0.2)  # gloo's thread lets go of its last message
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
