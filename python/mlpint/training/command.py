"""The training loop behind ``mlpint train``: the same script on every rank, on the same batches."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..comm.communicator import Comm
from ..errors import ConfigError
from ..mgrit.recorder import span
from ..parallel.trace import trace
from .config import TrainConfig
from .loggers import Hook
from .report import Report
from .run_directory import run_directory
from .stop_signals import Stopped, StopSignals
from .tasks import Task
from .trace_picture import TRACE
from .trainer import Trainer

_TRACED_FROM = 10  # steps after which what happens once is over


def train(
    config: TrainConfig, task: Task, comm: Comm, checkpoint: Checkpoint | None = None, hook: Hook | None = None
) -> Path:
    """Trains a model and writes the run's directory: metrics.jsonl, pictures, checkpoints, a report. Collective.

    Args:
        config: what to do.
        task: what is trained, with the same data on every rank.
        comm: the ranks, those of one replica in a mesh of several.
        checkpoint: to go on from.
        hook: called on rank 0 with each line of metrics.jsonl, the header first.

    Returns:
        The run's directory.

    Raises:
        UserError: on all ranks; ranks that disagree, files that cannot be written, a damaged checkpoint, a loss that is
            no number.
        Stopped: on all ranks; one had SIGINT or SIGTERM, and the run is written down as it then stood.
    """
    if config.run.device == "cpu":
        comm.use(torch.device("cpu"))
    _agree(config, task, comm.world)
    try:
        trainer = Trainer(config, task, comm)
    except ValueError as error:  # what the number of ranks does not allow, alike on all of them
        raise ConfigError(str(error)) from None
    if checkpoint is not None:
        trainer.resume(checkpoint)
    elif config.run.init_from:
        trainer.start_from(config.run.init_from)
    with run_directory(config, comm.world, checkpoint) as directory:
        _run(trainer, directory, hook)
    return directory


def _run(trainer: Trainer, directory: Path, hook: Hook | None) -> None:
    report, run = Report(trainer, directory, hook), trainer.config.run
    traced, stop = _traced(trainer), 0
    with report.decisions(), ExitStack() as tracing, StopSignals() as signals:
        for phase in trainer.phases():
            if traced and trainer.step == traced[0]:
                tracing.enter_context(trace(directory / TRACE, trainer.comm))
            started = time.perf_counter()
            with span("step", number=trainer.step + 1):
                loss, norm = trainer.train_step(phase)
            if traced and trainer.step == traced[-1] + 1:
                tracing.close()
            seconds = time.perf_counter() - started
            done, last = trainer.step, trainer.step == trainer.total
            due = run.eval_every and done % run.eval_every == 0
            measures = trainer.validate() if due or last else None
            report.step(done, loss, measures, norm, seconds)
            stop = 0 if last else signals.agreed(trainer.comm.world)
            if last or stop or (run.checkpoint_every and done % run.checkpoint_every == 0):
                trainer.save(directory / "checkpoints")
            if stop:
                break
    if stop:
        report.close(None, None)
        name = signal.Signals(stop).name
        raise Stopped(stop, f"{name}: stopped after step {trainer.step}; resume with mlpint train --resume {directory}")
    report.close(trainer.sample(), trainer.compare())


def _traced(trainer: Trainer) -> range:
    """The steps that are traced, from 0: three once training is under way, or the last of a shorter run."""
    if not trainer.config.run.trace:
        return range(0)
    end = min(trainer.step + _TRACED_FROM + 3, trainer.total)
    return range(max(trainer.step, end - 3), end)


def _agree(config: TrainConfig, task: Task, comm: Comm) -> None:
    values = {name: repr(value) for name, value in config.flat().items()}
    try:
        comm.vote({**values, "training data": task.digest(), "torch": torch.__version__}, "the training run")
    except ValueError as error:
        raise ConfigError(str(error)) from None
