"""Layer-parallel training over NCCL: checked against the unwrapped modules, then timed against their serial loop.

    torchrun --nproc-per-node 4 benchmarks/gpu_nccl.py        # or mpirun -n 4 python benchmarks/gpu_nccl.py
    python benchmarks/gpu_nccl.py --smoke                     # one GPU: NCCL with one rank, the solver on the GPU

Checks: output, input gradient and parameter gradients of the exact sweep, and of MGRIT with as many iterations as make
it exact, against the same modules run as a loop in float64. In float64 the relative error is at most 1e-12; in float32
and bfloat16 it is at most 3 times that of the loop in that dtype. Times: (1,1) and serial steps in turn, rank 0 running
the serial loop while the others wait; medians, and the median of the ratios of neighbouring pairs. Exit code 1 if a
check fails, 0 with a line that says so where there are too few GPUs.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time

import torch
from block import Block

import mlpint
from mlpint import MGRIT, LayerParallel, _core
from mlpint.comm.nccl import nccl_transport

SLACK = 3.0  # the error of a sweep may be so many times that of the plain loop in the same dtype


def loop(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def step(forward, x):
    """Output and input gradient of one forward and backward; parameters' gradients are left in place."""
    x = x.clone().requires_grad_()
    y = forward(x)
    y.float().square().mean().backward()
    return y.detach(), x.grad


def gradients(layers):
    return [p.grad for layer in layers for p in layer.parameters()]


def relative(values, references):
    """Largest relative error over the tensors; infinite where one is no number."""
    errors = [float((v.double() - r).norm() / r.norm()) for v, r in zip(values, references, strict=True)]
    return max(math.inf if math.isnan(e) else e for e in errors)


def check(comm, dtype, device, args):
    """Compares every exact way to run the stack with the loop in float64; true if all are as near as they should be."""
    torch.manual_seed(0)
    depth = args.check_layers
    layers = [Block(64, 4, depth).to(device, dtype) for _ in range(depth)]
    x = torch.randn(2, 32, 64, device=device).to(dtype)
    reference = copy.deepcopy(layers)
    for layer in reference:
        layer.double()
    y, dx = step(lambda v: loop(reference, v), x.double())
    plain = copy.deepcopy(layers)
    loop_values = step(lambda v: loop(plain, v), x)
    unit = relative([*loop_values, *gradients(plain)], [y, dx, *gradients(reference)])
    limit = max(SLACK * unit, 1e-12) if dtype is not torch.float64 else 1e-12
    ways = {"exact sweep": MGRIT(levels=1)}
    for relaxation, levels, cfactor in (("F", 2, 4), ("FCF", 2, 4), ("F", 3, 2)):
        k = math.ceil(depth / cfactor)
        k = math.ceil(depth / (2 * cfactor)) + 1 if relaxation == "FCF" else k
        ways[f"{levels} levels, {relaxation}, cf {cfactor}, {k} iterations"] = MGRIT(
            levels=levels, cfactor=cfactor, forward_iters=k, backward_iters=k, relaxation=relaxation
        )
    good = True
    for name, options in ways.items():
        blocks = LayerParallel(copy.deepcopy(layers), options, comm=comm)
        values = step(blocks, x)
        comm.synchronize()
        local = sorted(blocks.local_layers)
        ours = [*values, *gradients(blocks.local_layers[n] for n in local)]
        error = relative(ours, [y, dx, *gradients(reference[n] for n in local)])
        worst = max(map(float, comm.gather(repr(error).encode())))
        good &= worst <= limit
        if comm.rank == 0:
            verdict = "ok" if worst <= limit else "WRONG"
            print(f"{str(dtype).removeprefix('torch.'):9} {name:36} error {worst:.1e}, at most {limit:.1e}: {verdict}")
    return good


def finish(comm, device):
    comm.synchronize()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(comm, device, call):
    comm.barrier()
    start = time.perf_counter()
    call()
    finish(comm, device)
    return time.perf_counter() - start


def time_steps(comm, device, args):
    """Medians of a serial step on rank 0's device alone and of a (1,1) step, for both coarsening factors."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    layers = [Block(args.dim, args.heads, args.layers).to(device, dtype) for _ in range(args.layers)]
    x = torch.randn(args.batch, args.sequence, args.dim, device=device).to(dtype)
    for cfactor in (4, 8):
        options = MGRIT(cfactor=cfactor, forward_iters=1, backward_iters=1)
        blocks = LayerParallel(layers, options, comm=comm)
        serial, parallel = [], []
        for _ in range(args.repeats + 3):
            alone = timed(comm, device, lambda: step(lambda v: loop(layers, v), x) if comm.rank == 0 else None)
            for layer in layers:
                layer.zero_grad()
            together = timed(comm, device, lambda blocks=blocks: step(blocks, x))
            serial.append(alone)
            parallel.append(max(map(float, comm.gather(repr(together).encode()))))
            blocks.zero_grad()
        serial, parallel = serial[3:], parallel[3:]
        if comm.rank == 0:
            ratio = statistics.median(s / p for s, p in zip(serial, parallel, strict=True))
            print(
                f"(1,1) cf {cfactor} on {comm.size} ranks ({comm.name}), {args.layers} layers, d {args.dim}, "
                f"{args.heads} heads, sequence {args.sequence}, batch {args.batch}, {args.dtype}: serial "
                f"{statistics.median(serial) * 1e3:.2f} ms, layer-parallel {statistics.median(parallel) * 1e3:.2f} ms, "
                f"{ratio:.2f}x, {args.repeats} pairs"
            )


def machine(device):
    name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "CPU"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else "none"
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}, Python {sys.version.split()[0]}"


def smoke(args):
    """What one GPU can show: the real library loads and forms a communicator, the stack is exact on the GPU."""
    transport = nccl_transport(_core.SelfTransport(), "cuda:0")
    comm = mlpint.Comm(transport, "nccl", 0, 60.0)
    print(f"NCCL joined: rank {transport.rank} of {transport.size}, GPU {transport.device}")
    good = all([check(comm, dtype, comm.device, args) for dtype in (torch.float64, torch.float32, torch.bfloat16)])
    transport.check()
    transport.close()
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 32), ("dim", 1024), ("heads", 16), ("sequence", 512), ("batch", 8), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--check-layers", type=int, default=13, help="depth of the stacks that are checked")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float64"], help="of the timing")
    parser.add_argument("--smoke", action="store_true", help="one GPU, one rank, no timing")
    parser.add_argument("--cpu", action="store_true", help="try the script itself on CPU ranks")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not args.cpu and gpus < (1 if args.smoke else 2):
        wanted = "needs a GPU" if args.smoke else "needs at least 2 GPUs"
        print(f"benchmarks/gpu_nccl.py {wanted}, torch {torch.__version__} sees {gpus}: nothing was run")
        return 0
    if args.smoke:
        print(machine(torch.device("cuda:0")))
        return 0 if smoke(args) else 1
    comm = mlpint.init()
    if comm.size == 1:
        parser.error(
            f"one rank: start with torchrun --nproc-per-node {max(2, gpus)} benchmarks/gpu_nccl.py, or --smoke"
        )
    if args.cpu:
        comm.device = torch.device("cpu")
        torch.set_num_threads(1)
    elif comm.name != "nccl":
        parser.error(f"the ranks are connected by {comm.name}: start at most one rank a GPU, {gpus} here")
    if comm.rank == 0:
        print(machine(comm.device), flush=True)
    good = all([check(comm, dtype, comm.device, args) for dtype in (torch.float64, torch.float32, torch.bfloat16)])
    time_steps(comm, comm.device, args)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
