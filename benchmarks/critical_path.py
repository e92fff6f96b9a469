"""The critical path of a training step, counted: the real solver on any number of ranks, in one process.

    python benchmarks/critical_path.py
    python benchmarks/critical_path.py --levels

The ranks are threads and the messages real, but time is counted, not measured: every rank has a clock that each layer
evaluation moves on (forward 1, input-vjp 1, combined vjp 2 units; a slice of the batch its part of that) and that a
message carries to its receiver, which costs --hop units on the way. Printed: units of the serial step (3 N), of the
step as counted, and of the formula for layers with a backward in two halves; speed-up without and with hops.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import threading
from collections import defaultdict

import torch
from torch import nn

from mlpint import MGRIT, Comm, LayerParallel, _core
from mlpint.layers.module_evaluator import ModuleEvaluator

UNITS = {"forward": 1, "input_vjp": 1, "parameter_vjp": 1, "combined_vjp": 2}
BATCH = 16  # samples, which every number of slices below divides
clock = threading.local()


class Mailboxes:
    def __init__(self):
        self.lock, self.queues = threading.Lock(), defaultdict(queue.Queue)

    def __getitem__(self, key):
        with self.lock:
            return self.queues[key]


class CountedTransport:
    """Messages between threads that carry their sender's clock; the interface of csrc/transport/python.hpp."""

    def __init__(self, rank, size, boxes):
        self.rank, self.size, self.boxes = rank, size, boxes

    def send(self, to, tag, state):
        tensors = [t.clone() for t in state.tensors] if hasattr(state, "tensors") else bytes(state)
        self.boxes[self.rank, to, tag].put((clock.now + clock.hop, tensors))
        return Sent()

    def receive(self, source, tag, state):
        return Received(self.boxes[source, self.rank, tag], state)


class Sent:
    def test(self):
        return True

    def wait(self, seconds):
        pass


class Received:
    def __init__(self, box, state):
        self.box, self.state = box, state

    def test(self):
        return False

    def wait(self, seconds):
        sent, tensors = self.box.get(timeout=seconds)
        clock.now = max(clock.now, sent)
        if hasattr(self.state, "tensors"):
            for into, tensor in zip(self.state.tensors, tensors, strict=True):
                into.copy_(tensor)
        else:
            self.state[:] = tensors


def counted(self, level):
    def count(kind):
        self.evaluations[kind][level] += 1
        clock.now += UNITS[kind] * clock.samples / BATCH

    return count


def sized(method):
    """The clock learns how large a part of the batch an evaluation is of."""

    def evaluate(self, n, state, *args):
        clock.samples = state.tensors[0].shape[0]
        return method(self, n, state, *args)

    return evaluate


def count_units(patch=setattr):
    patch(ModuleEvaluator, "_counter", counted)
    for name in ("_forward", "_input_vjp", "_finish"):
        patch(ModuleEvaluator, name, sized(getattr(ModuleEvaluator, name)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return x + 0.1 * torch.tanh(self.linear(x))


def step_units(depth: int, ranks: int, options: MGRIT, layout: str, slices: int = 1, hop: float = 0.0) -> float:
    """The latest clock after one forward and backward pass."""
    boxes, layers, latest, errors = Mailboxes(), [Layer() for _ in range(depth)], [0] * ranks, []

    def rank_main(rank):
        try:
            clock.now, clock.hop = 0, hop
            transport = _core.PythonTransport(CountedTransport(rank, ranks, boxes)) if ranks > 1 else None
            comm = Comm(transport or _core.SelfTransport(), "counted", 0, 60.0)
            stack = LayerParallel(layers, options, comm=comm, layout=layout, chain_slices=slices)
            clock.now = 0
            stack.pass_keys.number = 3  # the first passes compare what the ranks were given, with messages of their own
            stack(torch.ones(BATCH, 2)).sum().backward()
            latest[rank] = clock.now
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=rank_main, args=(r,), daemon=True) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return max(latest)


def formula(depth: int, ranks: int, options: MGRIT, layout: str, slices: int = 1) -> float:
    """Two chains and the sweeps; in the cyclic layout the pipeline fills too."""
    chain, share = depth / options.cfactor, depth / ranks
    if layout == "cyclic":
        group = min(ranks, options.cfactor)
        return 2 * depth / group + 3 * share + (3 * group - 4) * options.cfactor / group
    k = options.forward_iters + options.backward_iters
    return 2 * chain * (1 - 1 / ranks) / slices + (k + 1) * share


CASES = [
    ("block", "injection", 1, 1, 4, 32, (2, 4, 8), (1, 4)),
    ("block", "injection", 1, 1, 8, 32, (2, 4), (1,)),
    ("block", "injection", 2, 1, 4, 32, (2, 4, 8), (1,)),
    ("block", "injection", 1, 1, 4, 128, (8, 32), (1,)),
    ("block", "injection", 1, 1, 4, 64, (8, 16), (1, 4, 8)),
    ("block", "injection", 2, 1, 4, 64, (8, 16), (1, 4, 8)),
    ("block", "injection", 1, 1, 8, 64, (8,), (1, 4, 8)),
    ("cyclic", "sum", 1, 1, 4, 32, (2, 4), (1,)),
    ("cyclic", "sum", 1, 1, 4, 64, (4, 8), (1,)),
    ("cyclic", "sum", 1, 1, 8, 128, (8, 16), (1,)),
    ("cyclic", "sum", 1, 1, 16, 1024, (64,), (1,)),
]

# Three levels beside two, where a step's iterations are as many both ways: (iterations, relaxation).
SWEEPS = [(1, "F"), (2, "F"), (2, "FCF")]


def levels() -> None:
    print("depth  ranks  levels  setting      relaxation  counted  speed-up")
    for depth, ranks, depth_levels in itertools.product((64, 128), (8, 16, 32), (2, 3)):
        for iterations, relaxation in SWEEPS:
            options = MGRIT(depth_levels, 4, iterations, iterations, relaxation=relaxation)
            units = step_units(depth, ranks, options, "block")
            setting = f"({iterations},{iterations}) cf 4"
            print(
                f"{depth:5}{ranks:7}{depth_levels:8}  {setting:13}{relaxation:12}{units:7.1f}{3 * depth / units:10.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hop", type=float, default=0.2, help="what a message costs, in layer forwards (0.2)")
    parser.add_argument("--levels", action="store_true", help="two levels beside three, instead")
    args = parser.parse_args()
    hop = args.hop
    torch.set_num_threads(1)
    count_units()
    if args.levels:
        return levels()
    print("layout  operator   setting           N  ranks  slices  serial  counted  formula  speed-up  with hops")
    for layout, coarse, kf, kb, cfactor, depth, rank_counts, slice_counts in CASES:
        for ranks, slices in itertools.product(rank_counts, slice_counts):
            options = MGRIT(2, cfactor, kf, kb, coarse=coarse)
            units, model = (
                step_units(depth, ranks, options, layout, slices),
                formula(depth, ranks, options, layout, slices),
            )
            delayed = step_units(depth, ranks, options, layout, slices, hop)
            print(
                f"{layout:8}{coarse:11}({kf},{kb}) cf {cfactor:<4}{depth:>6}{ranks:>7}{slices:>8}"
                f"{3 * depth:>8}{units:>9.1f}{model:>9.1f}{3 * depth / units:>10.2f}{3 * depth / delayed:>11.2f}"
            )


if __name__ == "__main__":
    main()
