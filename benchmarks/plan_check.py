"""What ``mlpint plan --measure`` predicts beside what a step then takes, for every way to use two ranks.

    mpirun -n 2 python benchmarks/plan_check.py

Measures layer, head and messages as the planner does, before and after it trains with each setting in turn (forward,
backward and the mean over replicas; no optimiser), and takes the mean of both predictions: a shared machine may be
slower for minutes. Prints seconds predicted and measured (medians of --repeats), their ratio, and how
many pairs of settings are in the wrong order by more than a tenth.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time

import machine
import torch

import mlpint
from mlpint import MGRIT
from mlpint.cli.plan import first_call, network_of
from mlpint.comm.start import replicated
from mlpint.parallel.data_parallel import average_gradients
from mlpint.planning.measuring import measure
from mlpint.planning.ways import Way, price
from mlpint.training.config import TrainConfig
from mlpint.training.tasks import make
from mlpint.training.trainer import Trainer


def exact(m: int = 1, **more) -> Way:
    return Way(slices=m, **{"ranks": 2, **more})


def solved(kf: int, kb: int, cfactor: int, m: int = 1, coarse: str = "injection", **more) -> Way:
    return Way(1, 2, MGRIT(2, cfactor, kf, kb, coarse=coarse), m, **more)


WAYS = [
    exact(1),
    exact(2),
    exact(4),
    exact(replicas=2, ranks=1),
    solved(1, 1, 4),
    solved(1, 1, 4, 2),
    solved(1, 1, 8),
    solved(1, 1, 8, 2),
    solved(2, 1, 4),
    solved(2, 1, 4, 2),
    solved(2, 2, 4),
    solved(2, 1, 8),
    solved(1, 1, 4, coarse="fitted"),
    solved(2, 1, 4, coarse="fitted"),
    solved(1, 1, 2),
    solved(1, 1, 4, coarse="sum", layout="cyclic"),
]


def steps_of(way: Way, config: TrainConfig, comm):
    """A step of training that way."""
    solver = {f.name: getattr(way.options, f.name) for f in dataclasses.fields(way.options)}
    key = "serial_microbatches" if way.options.exact else "chain_slices"
    values = config.flat() | solver | {key: way.slices, "layout": way.layout, "control": "off"}
    values |= {"data_parallel": way.replicas, "batch": config.data.batch // way.replicas}
    own = TrainConfig.of(values)
    trainer = Trainer(own, make(own), comm if way.replicas == 1 else replicated(comm, way.replicas))

    def step():
        trainer.forward_backward(0, trainer.comm.data.rank, trainer.comm.data.rank)
        average_gradients(trainer.model, trainer.comm)
        trainer.optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 32), ("dim", 128), ("heads", 4), ("sequence", 64), ("batch", 8), ("repeats", 11)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    names = ("layers", "dim", "heads", "sequence", "batch")
    config = TrainConfig.of({n: getattr(args, n) for n in names} | {"open_layers": 0, "close_layers": 0})
    network, small, loss, _ = network_of(config, torch.device("cpu"))
    layer, state, layer_args, kwargs = first_call(small, loss)
    steps = [steps_of(way, config, comm) for way in WAYS]
    seconds: list[list[float]] = [[] for _ in WAYS]
    measured_costs = [measure(layer, state, layer_args, kwargs, loss, comm)]
    for _ in range(args.repeats + 2):
        for step, times in zip(steps, seconds, strict=True):
            comm.barrier()
            start = time.perf_counter()
            step()
            comm.barrier()
            times.append(time.perf_counter() - start)
    measured_costs.append(measure(layer, state, layer_args, kwargs, loss, comm))
    if comm.rank:
        return
    prices = [[price(w, network, c, c.latency, c.transfer / state.nbytes).time for w in WAYS] for c in measured_costs]
    predicted = [statistics.mean(pair) for pair in zip(*prices, strict=True)]
    measured = [statistics.median(times[2:]) for times in seconds]
    print(machine.describe(), f"{comm.size} ranks ({comm.name}); {measured_costs}", sep="\n")
    print("  predicted   measured  ratio  way")
    for way, p, t in zip(WAYS, predicted, measured, strict=True):
        print(f"{p * 1e3:8.1f} ms{t * 1e3:8.1f} ms{p / t:7.2f}  {way.name}")
    pairs = list(itertools.combinations(zip(predicted, measured, strict=True), 2))
    wrong = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 and abs(a[1] / b[1] - 1) > 0.1 for a, b in pairs)
    within = sum(abs(p / t - 1) <= 0.15 for p, t in zip(predicted, measured, strict=True))
    print(
        f"within 15%: {within} of {len(WAYS)}; pairs that differ by a tenth in the wrong order: {wrong} of {len(pairs)}"
    )


if __name__ == "__main__":
    main()
