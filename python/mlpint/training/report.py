"""What a training run shows and writes down: log lines, metrics.jsonl, the loss curve, the closing summary."""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..comm.collectively import collectively
from ..control.ladder import short_form
from ..errors import MissingPackageError
from .closing import closing, ranks_of
from .comparison import Comparison
from .html_report import report_page, target_of
from .loggers import Hook, Logger, make_logger
from .metrics import Metrics, machine, read_lines
from .plots import loss_curves
from .tasks import Sample
from .terminal import terminal_of_launcher
from .trace_picture import TRACE, draw_step, last_step
from .trainer import Trainer


class Report:
    """Shows and writes down one run; only rank 0 does.

    Args:
        trainer: at the step that the run starts from.
        directory: where everything is written.
        hook: called with each line of metrics.jsonl, on rank 0.
    """

    def __init__(self, trainer: Trainer, directory: Path, hook: Hook | None = None) -> None:
        self.config, self.trainer, self.directory, self.comm = trainer.config, trainer, directory, trainer.comm.world
        self.started, self.first = time.perf_counter(), trainer.step
        self.interval: list[float] = []
        self.exact_steps, self.elapsed = 0, 0.0
        self.per_step = trainer.batches_a_step * trainer.task.per_batch
        self.bar: Any = None
        self.hook = hook
        self.logger: Logger | None = None
        self.metrics: Metrics | None = None  # None on all ranks but the first, which alone reports
        collectively(self.comm, self._open)
        terminal = terminal_of_launcher(sys.stdout, sys.stderr) if self.metrics is not None else None
        tqdm = _tqdm() if terminal is not None else None
        if tqdm is not None:
            self.bar = tqdm(total=trainer.total, initial=trainer.step, unit="step", leave=False, ncols=terminal)

    def _open(self) -> None:
        if self.comm.rank:
            return
        trainer = self.trainer
        header = {
            "config": dataclasses.asdict(self.config),
            "ranks": self.comm.size,
            "transport": self.comm.name,
            "threads": torch.get_num_threads(),
            "data": trainer.task.name,
            "unit": trainer.task.unit,
            "machine": machine(),
        }
        self.metrics = Metrics(
            self.directory / "metrics.jsonl", header, resumed_at=trainer.step if self.config.run.resume else None
        )
        for name, content in trainer.task.files().items():
            (self.directory / name).write_bytes(content)
        self.logger = make_logger(self.config.run.log, self.directory)
        self._pass_on(header)
        model, task = self.config.model, trainer.task
        idle = f", idle ranks {trainer.blocks.layout.idle_ranks}" if trainer.blocks.layout.idle_ranks else ""
        self._say(
            f"{model.layers} layers, dim {model.dim}, {model.heads} heads; "
            f"{self.per_step:,} {task.unit} a step; {trainer.mode}; "
            f"{ranks_of(trainer.comm)} over {self.comm.name}{idle}"
        )
        self._say(task.describe())
        if trainer.initial_weights:
            self._say(trainer.initial_weights)

    def _write(self, line: dict[str, Any]) -> None:
        assert self.metrics is not None
        self.metrics.write(line)
        self._pass_on(line)

    def _pass_on(self, line: dict[str, Any]) -> None:
        if self.logger is not None:
            self.logger.write(line)
        if self.hook is not None:
            self.hook(line)

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)  # which has the bar: a launcher passes both on, not in order
        else:
            print(line, flush=True)

    @contextmanager
    def decisions(self) -> Iterator[None]:
        """Inside, what error control and the trainer log is shown among the other lines."""
        loggers = [logging.getLogger(f"mlpint.{name}") for name in ("control.error_control", "training.trainer")]
        handler, levels = _Lines(self._say), [logger.level for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)

    def step(self, done: int, loss: float, measures: dict[str, float] | None, norm: float, seconds: float) -> None:
        """Reports a step that is done; ``measures`` are those of a validation after it, by name."""
        self.elapsed = time.perf_counter() - self.started
        if self.metrics is None:
            return
        run, decision = self.config.run, self.trainer.decision
        measured = {"val_loss": None} if measures is None else {f"val_{k}": v for k, v in measures.items()}
        control = None if decision is None or decision.action == "none" else decision.as_dict()
        if decision is not None and decision.skip:  # without a loss: curves pass over it
            self._write({"step": done, **measured, "control": control})
            if self.bar is not None:
                self.bar.update()
            return
        lr = self.trainer.optimizer.param_groups[0]["lr"]
        line = {
            "step": done,
            "loss": loss,
            **measured,
            "lr": lr,
            "grad_norm": norm,
            "seconds": seconds,
            self.trainer.task.unit: done * self.per_step,
            "mode": self.trainer.mode,
            "iterations": self.trainer.iterations,
        }
        phase, flops, total = self.trainer.phase, self.trainer.flops, self.trainer.total
        if phase is not None:
            line["network"], line["fine_step"] = phase.name, phase.fine_step + 1
        if flops is not None:
            replicas = self.config.run.data_parallel
            line["flops"], line["flops_all"] = replicas * flops.blocks, replicas * flops.all
        if self.trainer.relative_error is not None:
            line["relative_error"], line["consistency"] = self.trainer.relative_error, self.trainer.consistency
        if control is not None:
            line["control"] = control
        self._write(line)
        self.interval.append(seconds)
        self.exact_steps += self.trainer.mode == "exact"
        if self.bar is not None:
            self.bar.update()
        if done % run.log_every == 0 or done == total or measures is not None:
            left = self.elapsed / (done - self.first) * (total - done)
            held_out = "".join(
                f"  val {value:.4f}" if name == "loss" else f" {name} {value:.4f}"
                for name, value in (measures or {}).items()
            )
            self._say(
                f"step {done:>{len(str(total))}}/{total}  {phase.name + '  ' if phase else ''}"
                f"loss {loss:.4f}{held_out}  {self.trainer.mode}  {self._coarse_error()}"
                f"lr {lr:.1e}  grad {norm:.2f}  {len(self.interval) * self.per_step / sum(self.interval):,.0f} "
                f"{self.trainer.task.unit}/s  "
                f"{_memory(self.trainer.device):.0f} MiB  eta {int(left) // 60}:{int(left) % 60:02d}"
            )
            self.interval.clear()

    def _coarse_error(self) -> str:
        error = self.trainer.relative_error
        return "" if error is None else f"mu {self.trainer.consistency:.2g}  e {error:.3f}  "

    def close(self, sample: Sample | None, comparison: Comparison | None) -> None:
        collectively(self.comm, lambda: self._close(sample, comparison))

    def _close(self, sample: Sample | None, comparison: Comparison | None) -> None:
        if self.metrics is None:
            return
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if sample is not None and sample.measures:
            measures = {f"test_{name}": value for name, value in sample.measures.items()}
            self._write({"step": self.trainer.step, **measures})
        if comparison is not None:
            self._write({"step": self.trainer.step, "comparison": dataclasses.asdict(comparison)})
        self.metrics.close()
        if self.logger is not None:
            self.logger.close()
        lines, trainer = read_lines(self.directory / "metrics.jsonl"), self.trainer
        try:
            self._draw(lines)
        except MissingPackageError as error:
            self._say(f"no pictures and no report.html: {error}")
        if sample is not None:
            (self.directory / "sample.txt").write_text(sample.written, encoding="utf-8")
            self._say(f"\n--- sample: {sample.title} ---\n{sample.shown}\n---\n")
        steps = trainer.step - self.first
        for line in closing(trainer, self.directory, comparison, steps, self.exact_steps, self.elapsed):
            self._say(line)
        self._say(f"written    {self.directory}/: " + ", ".join(sorted(p.name for p in self.directory.glob("[!.]*"))))

    def _draw(self, lines: list[dict[str, Any]]) -> None:
        """The pictures and the page."""
        label = short_form(self.config.solver.mgrit())
        label = f"{label} at first" if self.trainer.control else label
        (self.directory / "loss.png").write_bytes(loss_curves({label: lines}, target=target_of(lines)))
        name, traced = str(self.directory), {}
        if (self.directory / TRACE).exists():
            step = last_step(self.directory / TRACE)
            traced[name] = step, draw_step(step)
            (self.directory / "trace.png").write_bytes(traced[name][1])
        if any("loss" in line for line in lines):  # none where all steps were skipped
            page = report_page({name: lines}, traced)
            (self.directory / "report.html").write_text(page, encoding="utf-8")


def _tqdm() -> Any:
    """The progress bar's class; None where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


class _Lines(logging.Handler):
    """Shows what is logged among the other lines, above a progress bar."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


def _memory(device: torch.device) -> float:
    """Largest memory of this rank so far, MiB: on the GPU if it trains there, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
