"""The ``mlpint`` command: train, plan, bench, tune, report, info."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .bench.command import add_flags as bench_flags
from .bench.tune import add_flags as tune_flags
from .checkpoint import Checkpoint, open_checkpoint
from .comm import launchers
from .comm.communicator import init
from .errors import ConfigError, UserError
from .training.config import KEYS, SECTIONS, SolverConfig, TrainConfig, from_saved, read_toml
from .training.fields import parsed
from .training.plots import OVER
from .training.tasks import Task, make


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, or 2 for input that the user can mend, told in one line."""
    leads = True
    try:
        leads = _leads()
        options = _parser().parse_args(arguments)
        options.run(options)
    except UserError as error:
        if leads:
            print(f"mlpint: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _leads() -> bool:
    """Whether this is rank 0, by the launcher's word: the ranks need not be connected yet."""
    try:
        return launchers.detect().rank == 0
    except ValueError as error:
        raise UserError(str(error)) from None


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, and only rank 0 shows its help."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, allow_abbrev=False, formatter_class=_HelpFormatter, **keywords)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        if _leads():
            super().print_help(file)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)


def _parser() -> _Parser:
    parser = _Parser(prog="mlpint", description="Layer-parallel training of transformers.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    train = commands.add_parser(
        "train",
        help="train a transformer, alone or under mpirun or torchrun",
        description="Trains a transformer, by default a byte-level GPT, layer-parallel over the ranks of mpirun or "
        "torchrun. Every flag is also a key of the TOML file; flags go before the file, the "
        "file before the checkpoint of --resume.",
    )
    train.add_argument(
        "--config", metavar="FILE", help="TOML file with tables " + ", ".join(f"[{s}]" for s in SECTIONS)
    )
    for name, section in SECTIONS.items():
        group = train.add_argument_group(name)
        for field in dataclasses.fields(section):
            _add_flag(group, field)
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="compare serial, pipeline and layer-parallel by a cost model")
    plan.add_argument("--ranks", default=2, type=int, metavar="N", help="ranks (default 2)")
    plan.add_argument(
        "--microbatches",
        default=4,
        type=int,
        metavar="N",
        help="slices of the batch that a pipeline streams (default 4)",
    )
    for name in ("layers", *_PLAN_KEYS):
        _add_flag(plan, KEYS[name])
    plan.set_defaults(run=_plan)

    bench = commands.add_parser(
        "bench",
        help="time kernels and blocks against plain PyTorch",
        description="Checks the accuracy of kernels and blocks, times them against plain PyTorch and writes a CSV file "
        "and plots. Reads what mlpint tune has written and never tunes itself.",
    )
    bench_flags(bench)
    bench.set_defaults(run=_bench)

    tune = commands.add_parser(
        "tune",
        help="find the fastest launch configuration of each kernel on this GPU",
        description="Times every candidate configuration of every kernel, and plain PyTorch beside them, and writes "
        "the fastest of each shape to the file that dispatch reads on this device.",
    )
    tune_flags(tune)
    tune.set_defaults(run=_tune)

    report = commands.add_parser("report", help="draw the loss curves of several runs into one picture")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or its metrics.jsonl")
    report.add_argument("--out", default="loss.png", metavar="PNG", help="the picture (default loss.png)")
    report.add_argument(
        "--over", default="steps", metavar="WHAT", help=f"{', '.join(OVER)}: what to draw them over (default steps)"
    )
    report.set_defaults(run=_report)

    info = commands.add_parser("info", help="versions, MPI, GPUs and launchers found on this machine")
    info.set_defaults(run=_info)
    return parser


def _add_flag(parser: Any, field: dataclasses.Field[Any]) -> None:
    flag = "--" + field.name.replace("_", "-")
    text = f"{field.metadata['help']} (default {field.default!r})".replace("%", "%%")
    if field.type == "bool":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        # Left as text here: the section says what is wrong with a value in the same words as for a TOML file.
        parser.add_argument(flag, metavar=str(field.type).upper(), help=text)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Key -> value of the flags that were given, each checked on its own."""
    values = {name: value for name, value in vars(options).items() if name in KEYS and value is not None}
    values = {name: parsed(KEYS[name], v) if isinstance(v, str) else v for name, v in values.items()}
    for section in SECTIONS.values():
        section(**{f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values})
    return values


def _train(options: argparse.Namespace) -> None:
    from .comm.collectively import jointly
    from .training.command import train

    flags = _given(options)  # known to be right before the ranks are connected
    try:
        comm = init()
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None
    # Files may be missing or different on one machine only: from here on an error on one rank is an error on all.
    prepared: list[Any] = []
    jointly(comm, lambda: prepared.extend(_prepare(flags, options.config)))
    config, task, checkpoint = prepared
    if config.run.threads or comm.size > 1:
        torch.set_num_threads(config.run.threads or 1)
    train(config, task, comm, checkpoint)


def _prepare(flags: Mapping[str, Any], config_file: str | None) -> tuple[TrainConfig, Task, Checkpoint | None]:
    """The whole configuration, the task and the checkpoint to go on from; all that reads files before training."""
    values = {**(read_toml(config_file) if config_file else {}), **flags}
    if values.get("resume") and values.get("init_from"):
        raise ConfigError(
            f"init_from = {values['init_from']!r}: is for a new run, and resume = {values['resume']!r} goes on with "
            "one; give one of them"
        )
    checkpoint = open_checkpoint(values["resume"]) if values.get("resume") else None
    if checkpoint is not None:
        saved = from_saved(checkpoint.info["config"])
        values = {**{k: v for k, v in saved.items() if k not in ("out", "resume")}, **values}
    config = TrainConfig.of(values)
    if checkpoint is not None:
        _check_resumable(config, saved, checkpoint)
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch sees no GPU; must be auto or cpu here")
    return config, make(config), checkpoint


def _check_resumable(config: TrainConfig, saved: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    now, saved = config.flat(), TrainConfig.of(saved).flat()  # keys that came later have their defaults
    for name in (*(f.name for f in dataclasses.fields(config.model)), "sequence", "optimizer", "multilevel", "preset"):
        if now[name] != saved[name]:
            raise ConfigError(f"{name} = {now[name]!r}: must be {saved[name]!r}, as in {checkpoint.path}")
    done = checkpoint.info.get("fine_steps", checkpoint.step)
    if config.run.steps <= done:
        raise ConfigError(f"steps = {config.run.steps}: must be above {done}, where {checkpoint.path} stands")


_NOT_PLANNED = ("tolerance", "step_size", "serial_microbatches", "recompute")
_NOT_PLANNED += ("control", "control_target", "control_every")
_PLAN_KEYS = tuple(f.name for f in dataclasses.fields(SolverConfig) if f.name not in _NOT_PLANNED)


def _plan(options: argparse.Namespace) -> None:
    from .planning.cost_model import plan

    config = TrainConfig.of(_given(options))
    for name in ("ranks", "microbatches"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} = {getattr(options, name)}: must be an integer of at least 1")
    solver, layers = config.solver, config.model.layers
    mgrit = solver.mgrit()
    buffers = solver.open_layers + solver.close_layers
    try:
        found = plan(
            layers,
            options.ranks,
            mgrit,
            buffers=buffers,
            microbatches=options.microbatches,
            layout=solver.layout,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    mode = f"MGRIT ({mgrit.forward_iters},{mgrit.backward_iters}), cfactor {mgrit.cfactor}, {mgrit.levels} levels"
    mode += f", {mgrit.coarse}" + (", cyclic layout" if solver.layout == "cyclic" else "")
    rows = {
        "serial": (found.serial, "exact gradients"),
        "pipeline": (found.pipeline, f"exact gradients, {options.microbatches} microbatches"),
        "layer_parallel": (found.layer_parallel, mode),
    }
    print(f"{layers} layers on {options.ranks} ranks; a step in units of one layer's forward (model, not measured)")
    for name, (cost, note) in rows.items():
        print(f"  {name.replace('_', '-'):<15}{cost:>8.1f}  speed-up {found.serial / cost:>5.2f}  {note}")
    print(f"fastest: {found.fastest.replace('_', '-')}")


def _bench(options: argparse.Namespace) -> None:
    from .bench.command import run

    run(options)


def _tune(options: argparse.Namespace) -> None:
    from .bench.tune import run

    run(options)


def _report(options: argparse.Namespace) -> None:
    from .training.metrics import read_lines
    from .training.plots import loss_curves

    if options.over not in OVER:
        raise ConfigError(f"over = {options.over!r}: must be one of {', '.join(OVER)}")
    runs = {}
    for name in options.runs:
        path = Path(name) / "metrics.jsonl" if Path(name).is_dir() else Path(name)
        runs[name] = read_lines(path)
        if not any("loss" in line for line in runs[name]):
            raise UserError(f"{path}: holds no step with a loss")
    try:
        loss_curves(runs, Path(options.out), options.over)
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written ({error.strerror})") from None
    print(f"written: {options.out}")


def _info(options: argparse.Namespace) -> None:
    from .info import info

    for name, value in info():
        print(f"{name:<18}{value}")
