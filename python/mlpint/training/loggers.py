"""Where the lines of metrics.jsonl go beside the file: TensorBoard, Weights & Biases, a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .metrics import settings_of

Hook = Callable[[Mapping[str, Any]], object]
LOGS = ("jsonl", "tensorboard", "wandb")


class Logger:
    """Takes the lines of a run, the header with its ``config`` first; see :func:`scalars` for what it shows."""

    def write(self, line: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """After the last line."""


def make_logger(kind: str, directory: Path) -> Logger | None:
    """The logger that ``log`` asks for; None for "jsonl", which is written in any case.

    Args:
        kind: of ``LOGS``.
        directory: of the run; TensorBoard's and wandb's files go there.

    Raises:
        ConfigError: its package is not installed.
    """
    if kind == "jsonl":
        return None
    try:
        return _TensorBoard(directory) if kind == "tensorboard" else _Wandb(directory)
    except ImportError:
        raise ConfigError(f"log = {kind!r}: needs the package {kind}: pip install {kind}") from None


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line, by name; of nested ones the path, as in ``control/measured/cosine``."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in scalars(value))
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield name, float(value)


class _TensorBoard(Logger):
    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(directory))

    def write(self, line: Mapping[str, Any]) -> None:
        if "config" in line:
            settings = settings_of(line).items()
            self.writer.add_text("settings", "\n".join(f"    {name} = {value}" for name, value in settings))
            return
        for name, value in scalars(line):
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class _Wandb(Logger):
    def __init__(self, directory: Path) -> None:
        import wandb

        self.module: Any = wandb
        self.directory = directory
        self.run: Any = None

    def write(self, line: Mapping[str, Any]) -> None:
        if self.run is None:
            # The project and all else are wandb's own settings, by its environment variables.
            self.run = self.module.init(dir=str(self.directory), name=self.directory.name, config=dict(line))
        else:
            self.run.log(dict(scalars(line)), step=line["step"])

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
