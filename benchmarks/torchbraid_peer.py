"""Training steps of TorchBraid and mlpint on the same modules, in turn, in one run.

    mpirun -n 2 python benchmarks/torchbraid_peer.py

TorchBraid (https://github.com/Multilevel-NN/torchbraid) is not on PyPI; without it this prints how to get it and ends.

What makes the comparison fair:
- One block class, one initialisation, each its own copy; x and loss are the same. A step is forward, backward and the
  gradients in ``.grad``, as far as each needs for its own layers; x gets a gradient, as below an embedding.
- Equal iteration counts: both count the coarse solve from the initial value as iteration 1 (XBraid's skip-downcycle)
  and end with a sweep over all layers. Both use F-relaxation, two levels and injection. The printed errors, against
  float64 autograd, show that both solve the same problem: those of the output are equal; the gradients differ a little,
  as TorchBraid takes the coarse adjoint from the first layer of an interval and mlpint from the last.
- TorchBraid's settings are those of its own training examples (examples/mnist/network_architecture.py: skip-downcycle,
  F-relaxation on the fine level, F-C-relaxation at the end, printing off), and residual norms off on top
  (drivers/tiny_imagenet/utils.py), which its examples leave on. Forward states and the graphs of the last sweep are
  kept, its default. Its head runs on rank 0 only, as its examples do it; mlpint's result is brought to every rank.
- Each of the three goes first in turn. The serial loop is timed on rank 0 while the others sleep in a barrier.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import statistics
import sys
import time

import machine
import torch
from block import Block

import mlpint
from mlpint import MGRIT, LayerParallel

HOW = (
    "TorchBraid is not installed, nothing to compare with: git clone https://github.com/Multilevel-NN/torchbraid, then "
    "'pip install --no-build-isolation ./torchbraid' with mpicc, cython, numpy, setuptools, mpi4py and torch at hand"
)


class Step(torch.nn.Module):
    """What TorchBraid calls: a step of size dt from x, and a trial call without dt that finds the shape."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, dt: float = 1.0) -> torch.Tensor:
        y = self.block(x)
        return y if dt == 1 else x + dt * (y - x)


def build_torchbraid(torchbraid, layers, cfactor, forward, backward):
    from mpi4py import MPI

    functors = [lambda block=block: Step(copy.deepcopy(block)) for block in layers]
    net = torchbraid.LayerParallel(
        MPI.COMM_WORLD, functors, [1] * len(layers), float(len(layers)), max_fwd_levels=2, max_bwd_levels=2, max_iters=2
    )
    net.setPrintLevel(0, True)
    net.setPrintLevel(0, False)
    net.setCFactor(cfactor)
    net.setSkipDowncycle(True)
    net.setNumRelax(1)
    net.setNumRelax(0, level=0)
    net.setFwdResidualCompute(False)
    net.setBwdResidualCompute(False)
    net.setFwdMaxIters(forward)
    net.setBwdMaxIters(backward)
    return net


def loss(y):
    return y.square().mean()


class Contestant:
    """One way to do a training step, and where its gradients are: parameters by layer."""

    def __init__(self, name, step, layers) -> None:
        self.name, self.step, self.layers, self.seconds = name, step, layers, []

    def clear(self) -> None:
        for layer in self.layers.values():
            for p in layer.parameters():
                p.grad = None


def contestants(comm, torchbraid, layers, setting):
    forward, backward, cfactor = setting
    serial = copy.deepcopy(layers)
    blocks = LayerParallel(
        copy.deepcopy(layers), MGRIT(cfactor=cfactor, forward_iters=forward, backward_iters=backward), comm=comm
    )
    net = build_torchbraid(torchbraid, layers, cfactor, forward, backward)
    compose = net.comp_op()

    def serial_step(x):
        y = x
        for layer in serial:
            y = layer(y)
        loss(y).backward()
        return y

    def torchbraid_step(x):
        y = net(x)
        compose(loss, y).backward()
        return y

    def mlpint_step(x):
        y = blocks(x)
        loss(y).backward()
        return y

    first = net.fwd_app.start_layer
    return [
        Contestant("serial loop", serial_step, dict(enumerate(serial))),
        Contestant("TorchBraid", torchbraid_step, {first + i: m for i, m in enumerate(net.layer_models)}),
        Contestant("mlpint", mlpint_step, blocks.local_layers),
    ]


def time_steps(comm, group, x, repeats):
    for i in range(repeats + 3):
        turn = i % len(group)
        for who in group[turn:] + group[:turn]:
            who.clear()
            z = x.clone().requires_grad_()
            comm.barrier()
            start = time.perf_counter()
            if comm.rank == 0 or who is not group[0]:
                who.step(z)
            comm.barrier()
            if i >= 3:
                who.seconds.append(time.perf_counter() - start)


def errors(comm, who, x, exact_output, exact_layers):
    """Relative errors of output, gradient of x and gradients of the parameters, on rank 0 and over all ranks."""
    who.clear()
    z = x.clone().requires_grad_()
    y = who.step(z)
    square = torch.zeros(2, dtype=torch.float64)
    for n, layer in who.layers.items():
        for p, q in zip(layer.parameters(), exact_layers[n].parameters(), strict=True):
            square[0] += (p.grad.double() - q.grad).square().sum()
            square[1] += q.grad.square().sum()
    comm.sum_ordered([square])
    if comm.rank:
        return None
    output, exact = exact_output
    return (
        float((y.detach().double() - output).norm() / output.norm()),
        float((z.grad.double() - exact).norm() / exact.norm()),
        float((square[0] / square[1]).sqrt()),
    )


def exact_gradients(layers, x):
    layers, z = copy.deepcopy(layers), x.double().requires_grad_()
    y = z
    for layer in layers:
        y = layer.double()(y)
    loss(y).backward()
    return (y.detach(), z.grad), layers


def compare(comm, torchbraid, layers, x, setting, repeats):
    group = contestants(comm, torchbraid, layers, setting)
    exact_output, exact_layers = exact_gradients(layers, x)
    found = [errors(comm, who, x, exact_output, exact_layers) for who in group[1:]]
    time_steps(comm, group, x, repeats)
    if comm.rank:
        return
    serial, torchbraid_, mlpint_ = (who.seconds for who in group)
    print("({},{}) cf {}, {} steps:".format(*setting, repeats))
    for who in group:
        middle, low, high = machine.ratio(who.seconds, serial)
        spread = f"{middle:.2f}x the time of serial (quartiles {low:.2f}-{high:.2f})"
        print(f"  {who.name:12}{statistics.median(who.seconds) * 1e3:8.1f} ms, {spread}")
    for who, (output, gradient, parameters) in zip(group[1:], found, strict=True):
        print(
            f"  {who.name:12}relative error of output {output:.2e}, gradient of x {gradient:.2e}, "
            f"of parameters {parameters:.2e}"
        )
    middle, low, high = machine.ratio(torchbraid_, mlpint_)
    print(f"  mlpint is {middle:.2f}x as fast as TorchBraid (quartiles {low:.2f}-{high:.2f})", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 32), ("dim", 128), ("heads", 4), ("sequence", 64), ("batch", 8), ("repeats", 21)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--settings", default="2,1,4 1,1,4", help="forward,backward iterations,cfactor ...")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    try:
        import torchbraid
    except ImportError as error:
        if comm.rank == 0:
            print(f"{HOW} ({error})")
        return 0
    if comm.size > 1 and comm.name != "mpi":
        parser.error("TorchBraid's ranks speak MPI: start this with mpirun")
    if args.layers % comm.size:
        parser.error(f"TorchBraid wants the {args.layers} layers to divide by the {comm.size} ranks")
    if comm.rank == 0:
        version = importlib.metadata.version
        try:
            peer = version("torchbraid")
        except importlib.metadata.PackageNotFoundError:
            peer = "from source"
        print(f"{machine.describe()}\nmlpint {version('mlpint')}, TorchBraid {peer}, {machine.mpi_library()}")
        print(
            f"{args.layers} layers, d {args.dim}, {args.heads} heads, sequence {args.sequence}, batch {args.batch}, "
            f"fp32, {comm.size} ranks"
        )
    torch.manual_seed(0)
    layers = [Block(args.dim, args.heads, args.layers) for _ in range(args.layers)]
    x = torch.randn(args.batch, args.sequence, args.dim)
    for setting in args.settings.split():
        compare(comm, torchbraid, layers, x, tuple(map(int, setting.split(","))), args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
