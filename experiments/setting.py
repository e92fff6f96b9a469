"""The network, the data and the measurements that the experiments on gradients share.

A byte GPT (d 128, 4 heads, sequence 64, batch 8, AdamW at 1e-3, 4 + 4 buffer layers) on the text that Python carries.
A setting is written operator:forward,backward:cfactor, for instance ``sum:1,1:4``, with :levels and :relaxation behind
it where they are not 2 and F (``injection:1,1:4:3:FCF``), or ``exact``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from mlpint import MGRIT
from mlpint.comm.communicator import Comm
from mlpint.control.gauges import GradientGauge, ResidualGauge
from mlpint.control.ladder import exact_options
from mlpint.control.rehearsal import Rehearsal
from mlpint.training.config import TrainConfig
from mlpint.training.tasks import make
from mlpint.training.trainer import Trainer

BUFFERS = 4
OPERATORS = ("injection", "scaled", "fitted", "sum")
VALUES = {"open_layers": BUFFERS, "close_layers": BUFFERS, "warmup": 50, "final_lr": 1.0, "weight_decay": 0.01}
VALUES |= {"stacked": False, "tied": False}
VALUES |= {"eval_batches": 16, "sample": 0, "compare": 0, "control": "off", "consistency": 0.0}


def arguments(doc: str, out: str, **numbers: float) -> argparse.ArgumentParser:
    """``--layers``, ``--steps``, ... with these defaults, and ``--out``."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, value in ({"layers": 32, "steps": 1000, "seed": 0, "beta2": 0.999} | numbers).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", default=f"experiments/results/{out}.jsonl")
    return parser


def options_of(setting: str) -> MGRIT:
    if setting == "exact":
        return MGRIT(levels=1)
    coarse, iterations, cfactor, levels, relaxation = [*setting.split(":"), "2", "F"][:5]
    forward, backward = map(int, iterations.split(","))
    return MGRIT(int(levels), int(cfactor), forward, backward, relaxation=relaxation, coarse=coarse)


def trainer_of(setting: str, args: argparse.Namespace, comm: Comm, **values: Any) -> Trainer:
    """A trainer that stands before its first step; ``values`` are keys of ``mlpint train``."""
    options = options_of(setting)
    chosen = {name: getattr(args, name) for name in ("layers", "steps", "seed", "beta2")}
    values = VALUES | chosen | {"cfactor": options.cfactor, "coarse": options.coarse} | values
    values |= {
        "levels": options.levels,
        "forward_iters": options.forward_iters,
        "backward_iters": options.backward_iters,
        "relaxation": options.relaxation,
    }
    config = TrainConfig.of(values)
    return Trainer(config, make(config), comm)


def gradient_quality(trainer: Trainer) -> dict[str, float]:
    """Cosine and relative error of the gradient over the layers between the buffers, on the next batch."""
    sides = []
    for way in ("own", "exact"):
        trainer.model.zero_grad(set_to_none=True)
        if way == "own":
            trainer.forward_backward(trainer.step, 0, trainer.position)
        else:
            with trainer.blocks.using(options=exact_options(trainer.blocks.options)):
                trainer.forward_backward(trainer.step, 0, trainer.position)
        middle = range(BUFFERS, len(trainer.blocks) - BUFFERS)
        layers = [layer for n, layer in trainer.blocks.local_layers.items() if n in middle]
        sides.append([p.grad.double().flatten() for layer in layers for p in layer.parameters()])
    trainer.model.zero_grad(set_to_none=True)
    sums = torch.zeros(4, dtype=torch.float64)
    for a, b in zip(*sides, strict=True):
        sums += torch.stack([a @ a, b @ b, a @ b, (a - b) @ (a - b)])
    trainer.comm.sum_ordered([sums])
    aa, bb, ab, dd = sums.tolist()
    return {"cosine": ab / (aa * bb) ** 0.5, "error": (dd / bb) ** 0.5}


def indicators(trainer: Trainer) -> dict[str, float]:
    """What error control would see on the next batch: convergence factors, and the cosine estimated."""
    blocks, options = trainer.blocks, trainer.blocks.options
    if options.exact:
        return {}

    def again() -> torch.Tensor:
        return trainer.training_loss(trainer.step, 0, trainer.position)

    with torch.no_grad():
        again()  # a rehearsal repeats a pass
    rehearsal = Rehearsal(blocks, again, trainer.device)
    factors = ResidualGauge(rehearsal, options).start().convergence_factor
    estimate = GradientGauge(rehearsal, options, against_exact=False).start()
    return {f"rho_{d}": f for d, f in factors.items()} | {"estimated_cosine": estimate.cosine}


def write(out: str, record: dict[str, Any], comm: Comm) -> None:
    """One JSON object on a line of the results; by rank 0."""
    if comm.rank == 0:
        machine = {"ranks": comm.size, "machine": f"{platform.machine()} CPU", "torch": torch.__version__}
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a") as file:
            file.write(json.dumps(record | machine) + "\n")


def follow(name: str, trainer: Trainer, args: argparse.Namespace, comm: Comm, about: dict[str, Any]) -> None:
    """Trains; writes ``about`` and what is measured every ``--check`` steps, and shows what error control changes."""
    training, exact_steps = 0.0, 0
    for step in range(args.steps + 1):
        if step % args.check == 0:
            record = about | {"layers": args.layers, "seed": args.seed, "beta2": args.beta2, "step": step}
            record |= {"val_loss": trainer.validate()["loss"]} | gradient_quality(trainer) | indicators(trainer)
            record |= {"mode": trainer.mode, "exact_steps": exact_steps, "seconds": training}
            write(args.out, record, comm)
            if comm.rank == 0:
                numbers = f"val {record['val_loss']:.4f}  cosine {record['cosine']:.4f}  {trainer.mode}"
                print(f"{name:16} step {step:5}  {numbers}  {training:.0f} s", flush=True)
        if step < args.steps:
            begun = time.perf_counter()
            trainer.train_step()
            training += time.perf_counter() - begun
            exact_steps += trainer.mode == "exact"
            if trainer.decision is not None and trainer.decision.action not in ("none", "hold") and comm.rank == 0:
                print(trainer.decision, flush=True)
