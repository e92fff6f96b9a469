"""A model with its optimiser and its place in the data, and what is done with them in a training run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from .. import checkpoint as checkpoints
from ..comm.collectively import collectively
from ..comm.communicator import Comm
from ..control.decision import Decision
from ..control.diagnosis import gradients_not_finite
from ..control.error_control import ErrorControl
from ..control.ladder import exact_options, short_form
from ..errors import ConfigError, TrainingError
from ..flops import FlopMeter
from ..mgrit.options import MGRIT
from ..mgrit.recorder import span
from ..multilevel import Multilevel, Phase
from ..nn import Block, BlockStack, EncoderDecoder, random_keys
from ..parallel.clip import scale_down, squared_grad_norm
from ..parallel.data_parallel import averaged_gradients
from ..parallel.layer_parallel import LayerParallel
from .comparison import Comparison, compare
from .config import SolverConfig, TrainConfig
from .initial_weights import check_identity, start_from
from .optimizer import learning_rate, make_optimizer
from .tasks import Sample, Task

SKIP_LIMIT = 5  # steps in a row that are not finite, as error control's
_log = logging.getLogger(__name__)


class Trainer:
    """A task's model, its optimiser and its place in the data.

    Args:
        config: of the run.
        task: what is trained.
        comm: the ranks, those of one replica in a mesh of several. Microbatch m of the replica r of D is the microbatch
            m D + r of a run without replicas, with the same random numbers.

    Attributes:
        model, blocks, optimizer: ``blocks`` is the layer-parallel stack inside the model.
        multilevel, control: those that the configuration asks for; else None.
        flops: the meter; None where the blocks differ from each other.
        initial_weights: where weights that were not drawn came from, in one line; empty where all were drawn.
        step: optimiser steps done, on all levels.
        position: batches taken from the training data, by all replicas.
        batches_a_step: of all replicas.
        phase: the last step's phase of multilevel training; None without.
        decision: what error control made of the last step, or that it was skipped; else None.
        skipped, bad_steps: steps skipped without error control, in all and in a row.
        iterations: what the last step's solves took, by direction; 0 where exact.
        consistency: mu of the last step.
        relative_error: of the coarse model in the last step, where there is a consistency term; else None.
        mode: the solver's options in the last step, in short.

    Raises:
        ValueError: options that the number of ranks or the task's layers do not allow.
    """

    def __init__(self, config: TrainConfig, task: Task, comm: Comm) -> None:
        self.config, self.task, self.comm, self.device = config, task, comm, comm.device
        self.batches_a_step = config.data.accumulate * comm.data.size
        solver = config.solver
        torch.manual_seed(config.run.seed)  # every rank builds the same model
        self.model = task.model()
        # Coarse networks of a stack have no buffer layers in common with it (mlpint.multilevel.stacks).
        buffers = solver.open_layers + solver.close_layers
        stacked = solver.stacked and not (config.multilevel.multilevel and buffers)
        self.model.blocks = self.blocks = _layer_parallel(self.model.get_submodule("blocks"), solver, comm, stacked)
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.multilevel: Multilevel | None = None
        self.flops: FlopMeter | None = None
        if config.multilevel.multilevel:
            options = config.multilevel.options()
            self.multilevel = Multilevel(self.blocks, self.optimizer, model=self.model, **options)
            self.flops = self.multilevel.flops
        elif _all_alike(self.blocks):
            self.flops = FlopMeter(self.blocks, self.model)
        self.initial_weights = ""
        self.step = self.position = self.skipped = self.bad_steps = 0
        self.phase: Phase | None = None
        self.decision: Decision | None = None
        self.iterations: dict[str, int] = {}
        self.consistency = self._mu = self.blocks.consistency
        self.relative_error: float | None = None
        self.mode = short_form(self.blocks.options)
        self.control: ErrorControl | None = None
        self.blocks.looked_after()  # where control is off somebody has said so
        if solver.measure is not None:
            self.control = ErrorControl(
                self.blocks,
                measure=solver.measure,
                target=solver.control_target or None,
                every=solver.control_every,
                # Weights that were trained elsewhere may make a poor coarse model, and stay so.
                start=0 if config.run.init_from and solver.control_start < 0 else solver.unchecked_steps,
                consistency="auto" if solver.control_consistency else None,
            )

    # --- a step ------------------------------------------------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        """The precision that the run asks for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.dtype == "bf16")

    def training_loss(self, step: int, microbatch: int, position: int) -> torch.Tensor:
        """The loss of a microbatch. Random numbers depend on the arguments alone."""
        self.blocks.dropout_key(step, microbatch)
        torch.manual_seed(random_keys.key(self.config.run.seed, step, microbatch, self.config.model.layers))
        batch = tuple(t.to(self.device) for t in self.task.train(position))
        with self.autocast():
            return self.task.loss(self.model, batch)

    def forward_backward(self, step: int, microbatch: int, position: int) -> float:
        """Adds a microbatch's gradients; returns its loss."""
        loss = self.training_loss(step, microbatch, position)
        (loss / self.config.data.accumulate).backward()
        return float(loss.detach())

    def phases(self) -> Iterator[Phase | None]:
        """What :meth:`train_step` takes, for each step that is left."""
        if self.multilevel is not None:
            yield from self.multilevel.schedule(self.config.run.steps)
        else:
            yield from itertools.repeat(None, self.config.run.steps - self.step)

    @property
    def total(self) -> int:
        """Optimiser steps in all; those that are certain to come, where the number of cycles is not fixed."""
        if self.multilevel is None:
            return self.config.run.steps
        return self.multilevel.total_steps(self.config.run.steps)

    def train_step(self, phase: Phase | None = None) -> tuple[float, float]:
        """One optimiser step, of one of the networks. Returns loss and gradient norm, the same on every rank.

        A step whose numbers are not finite is skipped, and counts.

        Raises:
            TrainingError: so many in a row were not; the weights are as before them.
        """
        self.phase = phase
        if phase is None:
            with self.flops.step() if self.flops else nullcontext():
                return self._train_step((self.step, self.config.run.steps))
        self.position = phase.batch_index * self.batches_a_step
        with phase:
            loss, norm = self._train_step((phase.clock, phase.clock_steps))
            skipped = self.decision is not None and self.decision.skip
            phase.loss(math.nan if skipped else loss)
        return loss, norm

    def _train_step(self, clock: tuple[int, int]) -> tuple[float, float]:
        accumulate, limit = self.config.data.accumulate, self.config.optimizer.clip or math.inf
        own = range(self.comm.data.rank, self.batches_a_step, self.comm.data.size)
        # In units of the loss whose gradients are accumulated; networks made of some of the layers do without.
        fine = self.phase is None or self.phase.fine
        self.consistency = self._consistency() if fine else 0.0
        self.blocks.consistency = self.consistency / accumulate
        losses = [self.forward_backward(self.step, m, self.position + m) for m in own[:-1]]
        with averaged_gradients(self.model, self.comm):
            losses.append(self.forward_backward(self.step, own[-1], self.position + own[-1]))
        self.iterations, self.mode = dict(self.blocks.stats.iterations), short_form(self.blocks.options)
        self.relative_error = self.blocks.relative_error() if self.blocks.consistency else None
        loss = self._mean(sum(losses) / accumulate)
        self.decision = None
        if self.control is not None and fine:
            last = self.step, own[-1], self.position + own[-1]
            with span("error control") if self.control.check_due else nullcontext():
                self.decision = self.control.step(loss, lambda: self.training_loss(*last))
            if self.decision.skip:
                self._go_on()
                return loss, math.nan
        norm = math.sqrt(squared_grad_norm(self.model))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.decision = self._skipped(loss, norm)
            self._go_on()
            return loss, math.nan
        self.bad_steps = 0
        scale_down(self.model, norm, limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(*clock, self.config.optimizer)
        with span("optimiser"):
            self.optimizer.step()
        self._go_on()
        return loss, norm

    def _consistency(self) -> float:
        """mu of this step."""
        solver, control = self.config.solver, self.control
        mu = control.consistency if control is not None and control.weights else self._mu
        return mu * solver.consistency_part(self.step, self.config.run.steps)

    def _mean(self, loss: float) -> float:
        """Over the replicas."""
        if self.comm.data.size == 1:
            return loss
        total = torch.tensor([loss], dtype=torch.float64, device="cpu")
        self.comm.data.sum_ordered([total])
        return float(total) / self.comm.data.size

    def _skipped(self, loss: float, norm: float) -> Decision:
        """What error control does of steps that are not finite, where there is none: leave them out, up to a limit."""
        self.skipped, self.bad_steps = self.skipped + 1, self.bad_steps + 1
        where = gradients_not_finite(self.blocks)  # scaling would make all of them so
        what = f"loss {loss}, gradient norm {norm}{where and '; '}{where}"
        if self.bad_steps >= SKIP_LIMIT:
            raise TrainingError(
                f"{self.bad_steps} steps in a row were not finite, the last one's {what}; lower lr, or raise "
                "forward_iters and backward_iters (0 is exact)"
            )
        options, reason = self.blocks.options, f"not finite; skipped, {self.bad_steps} in a row: {what}"
        decision = Decision(self.step + 1, "skip", options, options, reason, skip=True)
        if self.comm.world.rank == 0:
            _log.warning("%s", decision)
        return decision

    def _go_on(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.position = self.step + 1, self.position + self.batches_a_step

    # --- what has been learnt ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and the task's other measures of the exact network on held-out data."""
        self.model.eval()
        with self.blocks.using(options=exact_options(self.blocks.options)), self.autocast():
            measures = self.task.validate(self.model, self.device, self.comm)
        self.model.train()
        return measures

    @torch.no_grad()
    def sample(self) -> Sample | None:
        """What the exact network has learnt, to be looked at; None if no sample is wanted."""
        self.model.eval()
        with self.blocks.using(options=exact_options(self.blocks.options)):
            sample = self.task.sample(self.model, self.device, self.comm)
        self.model.train()
        return sample

    def compare(self) -> Comparison | None:
        """Layer-parallel against exact on the next batches; None if it is not wanted or there is only one way."""
        count = self.config.run.compare
        if not count or self.blocks.options.exact:
            return None

        def pass_(n: int) -> float:
            n = n * self.comm.data.size + self.comm.data.rank
            return self.forward_backward(self.step, n, self.position + n)

        return compare(self.model, self.blocks, pass_, count, self.comm)

    # --- stopping and going on ---------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """Writes a checkpoint of this step. Collective."""
        info = {"config": dataclasses.asdict(self.config), "position": self.position, "ranks": self.comm.world.size}
        info["task"] = self.task.identity()
        if self.control is not None:
            info["control"] = self.control.state_dict()
        if self.flops is not None:
            info["flops"] = self.flops.as_dict()
        extra = {}
        if self.multilevel is not None:
            state = self.multilevel.state_dict()
            info["multilevel"], extra = state["info"], state["tensors"]
            info["fine_steps"] = self.multilevel.flops.steps["fine"]
        keep = self.config.run.checkpoint_keep
        checkpoints.save(
            directory, self.step, self.model, self.optimizer, info=info, extra=extra, keep=keep, comm=self.comm
        )

    def start_from(self, path: str) -> None:
        """Takes the weights of another run where they fit, before the first step. Collective.

        Raises:
            UserError: on all ranks; see :func:`mlpint.training.initial_weights.start_from`.
        """
        self.initial_weights = start_from(path, self.model, self.config, self.task, self.comm.world)

    def resume(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Goes on where a checkpoint was written, before the first step. Collective.

        Raises:
            UserError: on all ranks; a damaged checkpoint, or one of other data or of other multilevel training.
        """
        check_identity(checkpoint, self.task, "go on with the data that the run began with")
        checkpoints.load(checkpoint, self.model, self.optimizer, comm=self.comm)
        self.step, self.position = checkpoint.step, checkpoint.info["position"]
        if self.flops is not None and "flops" in checkpoint.info:
            self.flops.load(checkpoint.info["flops"])
        multilevel = self.multilevel
        if multilevel is not None:
            tensors: dict[str, torch.Tensor] = {}
            collectively(self.comm.world, lambda: tensors.update(checkpoint.extra(multilevel.wants)))
            try:
                multilevel.load_state_dict({"info": checkpoint.info["multilevel"], "tensors": tensors})
            except ValueError as error:
                raise ConfigError(f"{checkpoint.path}: {error}") from None
        if self.control is None:
            return
        self.control.steps = checkpoint.info.get("fine_steps", self.step)  # coarse steps do not reach it
        state = checkpoint.info.get("control")
        # Where other options have been asked for, those it had come to are no rung above them: it begins anew.
        if state is not None and MGRIT(**state["options"]) in self.control.ladder:
            try:
                self.control.load_state_dict(state)
            except ValueError as error:
                raise ConfigError(f"{checkpoint.path}: {error}") from None


def _layer_parallel(blocks: nn.Module, solver: SolverConfig, comm: Comm, stacked: bool) -> LayerParallel:
    layers = list(blocks.children())
    depth = len(layers) - solver.open_layers - solver.close_layers
    stack = LayerParallel(
        _stacked(layers) if stacked else layers,
        solver.mgrit(),
        comm=comm,
        step_size=solver.step_size or 1 / depth,
        open_layers=solver.open_layers,
        close_layers=solver.close_layers,
        layout=solver.layout,
        recompute=solver.recompute,
        serial_microbatches=solver.serial_microbatches,
        chain_slices=solver.chain_slices or "auto",
        consistency=0.0 if solver.mu_by_default and depth == 1 else solver.mu,
    )
    for direction in ("forward", "backward"):
        stack.solver(direction)  # raises here what it would raise in the first step
    return stack


def _stacked(layers: list[nn.Module]) -> BlockStack | EncoderDecoder | list[nn.Module]:
    """The same layers, stacked where they are blocks of one kind, or of an encoder and a decoder."""
    found = [n for n in layers if isinstance(n, Block)]
    kinds = {type(n) for n in found}
    alike = len(found) == len(layers) and len({(type(n), n.settings) for n in found}) == len(kinds)
    if not alike:
        return layers
    return BlockStack.from_blocks(found) if kinds == {Block} else EncoderDecoder.from_blocks(found)


def _all_alike(blocks: LayerParallel) -> bool:
    """Whether all layers have parameters of the same names and shapes, or are stacked. Collective."""
    own = {str([(n, tuple(p.shape)) for n, p in layer.named_parameters()]) for layer in blocks.local_layers.values()}
    messages = blocks.comm.gather(json.dumps(sorted(own)).encode())
    return len({kind for message in messages for kind in json.loads(message)}) <= 1
