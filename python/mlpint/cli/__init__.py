"""The ``mlpint`` command: train, plan, bench, tune, report, info.

A file a command, but for those that live in the package they are of; only the command that is asked for is imported.
May import everything; nothing imports it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from .. import __version__
from ..comm import launchers
from ..errors import ConfigError, UserError


class _Command(NamedTuple):
    module: str  # has the functions add_flags(parser) and run(options)
    help: str
    description: str | None = None


_COMMANDS = {
    "train": _Command(
        "mlpint.cli.train",
        "train a transformer, alone or under mpirun or torchrun",
        "Trains a transformer, by default a byte-level GPT, layer-parallel over the ranks of mpirun or torchrun. Every "
        "flag is also a key of the TOML file; flags go before the file, the file before the checkpoint of --resume.",
    ),
    "plan": _Command("mlpint.cli.plan", "find the fastest way to use so many ranks, and what to type"),
    "bench": _Command(
        "mlpint.bench.command",
        "time kernels and blocks against plain PyTorch",
        "Checks the accuracy of kernels and blocks, times them against plain PyTorch and writes a CSV file and plots. "
        "Reads what mlpint tune has written and never tunes itself.",
    ),
    "tune": _Command(
        "mlpint.bench.tune",
        "find the fastest launch configuration of each kernel on this GPU",
        "Times every candidate configuration of every kernel, and plain PyTorch beside them, and writes the fastest of "
        "each shape to the file that dispatch reads on this device.",
    ),
    "report": _Command("mlpint.cli.report", "draw the loss curves of several runs into one picture"),
    "info": _Command("mlpint.info", "versions, MPI, GPUs and launchers found on this machine"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, or 2 for input that the user can mend, told in one line.

    What is wrong for all ranks is told by rank 0, and what a rank may have met alone by that rank.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = 0
    try:
        rank = _rank()
        options = parser(arguments).parse_args(arguments)
        options.run(options)
    except UserError as error:
        if rank == 0 or error.of_one_rank:
            kind = f" error on rank {rank}:" if rank else " error:"
            print(f"mlpint:{kind if error.is_fault else ''} {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _rank() -> int:
    """This rank, by the launcher's word: the ranks need not be connected yet."""
    try:
        return launchers.detect().rank
    except ValueError as error:
        raise UserError(str(error)) from None


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, and only rank 0 shows its help."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **keywords)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}{self._meant(message)}; see {self.prog} --help")

    def _meant(self, message: str) -> str:
        """A question, where what is wrong in an error of argparse's is close to what there is."""
        found = re.search(r"invalid choice: '(\w+)'|unrecognized arguments: (--[\w-]+)", message)
        if found is None:
            return ""
        flags = [name for parser in self._all() for name in parser._option_string_actions if name.startswith("--")]
        close = difflib.get_close_matches(found[1] or found[2], list(_COMMANDS) if found[1] else flags, 1)
        return f"; did you mean {close[0]}?" if close else ""

    def _all(self) -> list[argparse.ArgumentParser]:
        """This parser and those of its commands."""
        commands = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return [self, *(parser for parsers in commands for parser in parsers)]

    def print_help(self, file: Any = None) -> None:
        if _rank() == 0:
            super().print_help(file)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)


def parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these arguments: it knows the flags of the command that they begin with, and names the others."""
    top = _Parser(prog="mlpint", description="Layer-parallel training of transformers.")
    top.add_argument("--version", action="version", version=f"mlpint {__version__}")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in _COMMANDS.items():
        flags = commands.add_parser(name, help=command.help, description=command.description)
        if arguments and arguments[0] == name:
            module = importlib.import_module(command.module)
            module.add_flags(flags)
            flags.set_defaults(run=module.run)
    return top
