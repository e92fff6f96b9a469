"""The training loop behind ``mlpint train``: the same script on every rank, on the same batches."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..comm.communicator import Comm
from ..errors import ConfigError
from .config import TrainConfig
from .report import Report
from .run_directory import run_directory
from .tasks import Task
from .trainer import Trainer


def train(config: TrainConfig, task: Task, comm: Comm, checkpoint: Checkpoint | None = None) -> Path:
    """Trains a model and writes the run's directory: metrics.jsonl, loss.png, sample.txt, checkpoints. Collective.

    Args:
        config: what to do.
        task: what is trained, with the same data on every rank.
        comm: the ranks, those of one replica in a mesh of several.
        checkpoint: to go on from.

    Returns:
        The run's directory.

    Raises:
        UserError: on all ranks; ranks that disagree, files that cannot be written, a damaged checkpoint, a loss that is
            no number.
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
        _run(trainer, directory)
    return directory


def _run(trainer: Trainer, directory: Path) -> None:
    report, run = Report(trainer, directory), trainer.config.run
    with report.decisions():
        for phase in trainer.phases():
            started = time.perf_counter()
            loss, norm = trainer.train_step(phase)
            seconds = time.perf_counter() - started
            done, last = trainer.step, trainer.step == trainer.total
            due = run.eval_every and done % run.eval_every == 0
            measures = trainer.validate() if due or last else None
            report.step(done, loss, measures, norm, seconds)
            save_every = run.checkpoint_every
            if save_every and (done % save_every == 0 or last):
                trainer.save(directory / "checkpoints")
    report.close(trainer.sample(), trainer.compare())


def _agree(config: TrainConfig, task: Task, comm: Comm) -> None:
    values = {name: repr(value) for name, value in config.flat().items()}
    try:
        comm.vote({**values, "training data": task.digest(), "torch": torch.__version__}, "the training run")
    except ValueError as error:
        raise ConfigError(str(error)) from None
