"""Multilevel training against what a user would do instead, at equal FLOPs: loss on held-out text over what it cost.

    python experiments/multilevel.py --runs "plain:lr=1 multilevel:lr=1,budget=.56 stack:lr=1 shallow:lr=1"

A run is written method:key=value,...; keys of ``Run`` and, for multilevel, of :class:`mlpint.Multilevel`.

- ``plain``: the deep network, all the time;
- ``multilevel``: cycles over its coarse networks first; ``share`` is the part of the budget spent in them (it sets
  ``cycles``);
- ``stack``: a network of half the layers for ``share`` of the budget, then doubled to full depth, each layer copied
  next to itself (``grow=interleave``) or the whole stack on top of itself (``grow=stack``);
- ``shallow``: half the layers, all the time;
- ``width``: half the width and half the heads for ``share`` of the budget, then widened (width.py) and averaged with
  ``1 - mixed`` of a freshly drawn network; with ``both`` half the layers, too, then doubled as in ``stack``.

With ``consistency=mu`` the deep network's gradients, of exact sweeps, have the consistency term at intervals of 4
layers; what it costs there is not counted, as in layer-parallel training it costs no evaluation.

The budget is counted in blocks' FLOPs: 1 is ``--steps`` steps of the deep network. The learning rate is warmed up over
``warmup`` of the budget and falls as a cosine over the FLOPs spent, to a tenth, in all methods alike; or, with
``decay``, stays until that part of the budget is left and then falls in a line (WSD). Gradients are clipped to norm 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from width import widen

import mlpint
from mlpint.flops import FlopMeter
from mlpint.training.data import Batches, load
from mlpint.training.models import GPT, Shape

CLIP, POINTS, HELD_OUT = 1.0, 10, 16


@dataclasses.dataclass
class Run:
    """How a network is trained; ``options`` go to Multilevel."""

    method: str
    lr: float = 1.0
    optimizer: str = "sgd"
    budget: float = 1.0
    share: float = 0.5
    warmup: float = 0.05
    decay: float = 0.0
    layers: int = 12
    dim: int = 64
    heads: int = 4
    seed: int = 0
    grow: str = "interleave"
    consistency: float = 0.0
    mixed: float = 1.0
    both: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, text: str, seed: int) -> Run:
        method, _, rest = text.partition(":")
        values: dict[str, Any] = {"seed": seed}
        options = {}
        for part in filter(None, rest.split(",")):
            name, value = part.split("=")
            (values if name in cls.__dataclass_fields__ else options)[name] = _number(value)
        return cls(method, **values, options=options)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"True": True, "False": False}.get(text, text)


class Training:
    """A network on its way through the data, its measurements written as it goes."""

    def __init__(self, run: Run, args: argparse.Namespace) -> None:
        self.run, self.out, self.data, self.sequence = run, Path(args.out), args.data, args.sequence
        tokens = {"vocabulary": args.vocabulary, "tokenizer": "bpe"} if args.vocabulary else {}
        self.corpus = load(args.data, args.sequence, **tokens)
        self.vocabulary = max(args.vocabulary, self.corpus.vocabulary)  # small texts have fewer pairs than wanted
        self.batches = Batches(self.corpus, args.sequence, args.batch, run.seed)
        torch.manual_seed(run.seed)
        deep = self.network(run.layers)
        self.per_layer = self._flops_of(deep) // run.layers
        self.total = run.budget * args.steps * self.per_layer * run.layers
        self.model = deep
        if run.method in ("stack", "shallow"):
            self.model = self.network(run.layers // 2)
        if run.method == "width":
            self.model = self.network(run.layers // (1 + run.both), 2)
        self.spent = self.everything = self.tokens = self.position = self.points = 0
        self.seconds = 0.0

    def network(self, layers: int, narrower: int = 1) -> GPT:
        """Freshly drawn, of this depth, and so many times narrower than wanted in the end."""
        shape = Shape(layers, self.run.dim // narrower, self.run.heads // narrower)
        return GPT(self.vocabulary, self.sequence, shape)

    def _flops_of(self, model: GPT) -> int:
        """Of a step, in the blocks."""
        meter = FlopMeter(model.blocks)
        with meter.step():
            model(self.batches.train(0)[0])
        return meter.blocks

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.run.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=self.run.lr, betas=(0.9, 0.95), weight_decay=0.01)
        momentum = 0.9 if self.run.optimizer == "momentum" else 0.0
        return torch.optim.SGD(model.parameters(), lr=self.run.lr, momentum=momentum)

    def learning_rate(self) -> float:
        done = self.spent / self.total
        if done < self.run.warmup:
            return self.run.lr * max(done, 0.02 * self.run.warmup) / self.run.warmup
        if self.run.decay:
            return self.run.lr * max(min((1 - done) / self.run.decay, 1.0), 0.02)
        fall = (done - self.run.warmup) / (1 - self.run.warmup)
        return self.run.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * min(fall, 1.0))) / 2)

    def step(self, meter: FlopMeter, counted: AbstractContextManager, batch: int) -> None:
        """One optimiser step on a batch, inside what counts it on the meter."""
        before, outside, started = meter.blocks, meter.outside, time.perf_counter()
        with counted:
            inputs, targets = self.batches.train(batch)
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - started
        self.position, self.tokens = self.position + 1, self.tokens + targets.numel()
        self.spent, self.everything = self.spent + meter.blocks - before, self.everything + meter.outside - outside

    @torch.no_grad()
    def validate(self, noise: float = 0.0) -> tuple[float, float]:
        """Loss, and the share of tokens predicted, on held-out text with this share of the inputs replaced."""
        generator = torch.Generator().manual_seed(1)
        losses, right = [], []
        for i in range(HELD_OUT):
            inputs, targets = self.batches.validation(i, HELD_OUT)
            other = torch.randint(self.corpus.vocabulary, inputs.shape, generator=generator)
            inputs = torch.where(torch.rand(inputs.shape, generator=generator) < noise, other, inputs)
            logits = self.model(inputs).flatten(0, 1)
            losses.append(float(F.cross_entropy(logits, targets.flatten())))
            right.append(float((logits.argmax(-1) == targets.flatten()).float().mean()))
        return sum(losses) / HELD_OUT, sum(right) / HELD_OUT

    def point(self, always: bool = False) -> None:
        """Writes a line at every tenth of the budget, or now."""
        if not always and self.spent < self.total * self.points / POINTS:
            return
        self.points += 1
        loss, accuracy = self.validate()
        record = dataclasses.asdict(self.run) | {"data": Path(self.data).name or "embedded text"}
        record |= {"val_loss": loss, "accuracy": accuracy, "steps": self.position, "tokens": self.tokens}
        record |= {"fine_steps": self.spent / (self.per_layer * self.run.layers), "seconds": self.seconds}
        record |= {"flops": self.spent, "all_flops": self.spent + self.everything, "end": always}
        record |= {"gradient_norms": self.gradient_norms()}
        if always:
            if isinstance(self.model.blocks, mlpint.LayerParallel):
                self.model.blocks = nn.Sequential(*self.model.blocks.local_layers.values())
            record |= {"noisy_accuracy": self.validate(0.1)[1]}
            record |= self.mgrit_quality()
        record |= {"machine": f"{platform.machine()} CPU", "torch": torch.__version__}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out, "a") as file:
            file.write(json.dumps(record) + "\n")
        if always:
            print(f"{self.run}  val {loss:.4f}  accuracy {accuracy:.4f}  {self.seconds:.0f} s", flush=True)

    def _gradients(self) -> torch.Tensor:
        """Of the blocks on a held-out batch, one block after the other."""
        self.model.zero_grad(set_to_none=True)
        inputs, targets = self.batches.validation(0, HELD_OUT)
        F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten()).backward()
        found = torch.cat([p.grad.double().flatten() for p in self.model.blocks.parameters()])
        self.model.zero_grad(set_to_none=True)
        return found

    def gradient_norms(self) -> list[float]:
        """Of each block: even and odd ones should not differ."""
        return self._gradients().view(len(self.model.blocks), -1).norm(dim=1).tolist()

    def mgrit_quality(self) -> dict[str, float]:
        """Cosine of the blocks' gradient by MGRIT (injection) with the exact one, over the whole depth."""
        exact, blocks = self._gradients(), self.model.blocks
        found = {}
        for iterations in (1, 2):
            for cfactor in (2, 4):
                options = mlpint.MGRIT(2, cfactor, iterations, iterations)
                self.model.blocks = mlpint.LayerParallel(blocks, options)
                cosine = F.cosine_similarity(self._gradients(), exact, dim=0)
                found[f"cosine_{iterations}{iterations}_cf{cfactor}"] = float(cosine)
        self.model.blocks = blocks
        return found

    # --- the methods -------------------------------------------------------------------------------------------------

    def add_term(self) -> None:
        """From here on the consistency term is in the gradients of the network."""
        if self.run.consistency:
            self.model.blocks = mlpint.LayerParallel(
                self.model.blocks, mlpint.MGRIT(levels=1, cfactor=4), consistency=self.run.consistency
            )

    def deep(self, until: float = 1.0) -> None:
        """The network as it is, up to this part of the budget."""
        if until == 1:
            self.add_term()
        self.optimizer, meter = self.optimizer_of(self.model), FlopMeter(self.model.blocks, self.model)
        while self.spent < until * self.total:
            self.point()
            self.step(meter, meter.step(), self.position)

    plain = shallow = deep

    def stack(self) -> None:
        self.deep(self.run.share)
        self.double()
        self.deep()

    def double(self) -> None:
        """Gives the network twice its layers."""
        small = self.model
        torch.manual_seed(self.run.seed)
        self.model = self.network(self.run.layers)
        half = self.run.layers // 2
        state = small.state_dict()
        for n in range(self.run.layers):
            source = n // 2 if self.run.grow == "interleave" else n % half
            self.model.blocks[n].load_state_dict(small.blocks[source].state_dict())
        rest = {name: t for name, t in state.items() if not name.startswith("blocks.")}
        self.model.load_state_dict(rest, strict=False)

    def width(self) -> None:
        self.deep(self.run.share)
        narrow = self.model
        torch.manual_seed(self.run.seed)
        self.model = self.network(len(narrow.blocks))
        widen(narrow, self.model, self.run.heads // 2, self.run.mixed)
        if self.run.both:
            self.double()
        self.deep()

    def multilevel(self) -> None:
        self.add_term()
        self.optimizer, options = self.optimizer_of(self.model), self.run.options
        fine, one = self.total / (self.per_layer * self.run.layers), mlpint.Multilevel
        if "cycles" not in options:  # as many as the share of the budget pays for
            probe = one(self.model.blocks, self.optimizer, **options, cycles=1)
            plan = {name: n for name, n in probe_steps(probe).items() if name != "fine"}
            cost = sum(len(probe.networks[name].layers) * n for name, n in plan.items()) / self.run.layers
            options["cycles"] = max(1, round(self.run.share * fine / cost))
        multilevel = one(self.model.blocks, self.optimizer, model=self.model, **options)
        for phase in multilevel.schedule(round(fine) + 1):
            if phase.fine:
                self.point()
                if self.spent >= self.total:
                    break
            if self.run.consistency:
                self.model.blocks.consistency = self.run.consistency if phase.fine else 0.0
            self.step(multilevel.flops, phase, phase.batch_index)


def probe_steps(multilevel: mlpint.Multilevel) -> dict[str, int]:
    """Steps of each network in one cycle."""
    counts: dict[str, int] = {}
    schedule: Iterator[Any] = multilevel.schedule(1)
    for phase in schedule:
        with phase:
            counts[phase.name] = counts.get(phase.name, 0) + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", required=True)
    parser.add_argument("--steps", type=int, default=2000, help="fine steps that budget = 1 pays for")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--data", default="", help="text file; the text that Python carries if none is named")
    parser.add_argument("--sequence", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=0, help="byte pairs learnt from the text; bytes if 0")
    parser.add_argument("--out", default="experiments/results/multilevel.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in map(int, args.seeds.split()):
        for text in args.runs.split():
            training = Training(Run.of(text, seed), args)
            method: Callable[[], None] = getattr(training, training.run.method)
            method()
            training.point(always=True)


if __name__ == "__main__":
    main()
