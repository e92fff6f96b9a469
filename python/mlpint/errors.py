"""Errors that the person at the command line can mend: shown as one line, without a traceback."""

_LONGEST = 2000  # characters of a message: it may name what a hostile file holds, a line of 10 MB for instance


class UserError(Exception):
    """Wrong input of any kind; the message says what was wrong and what is allowed, in printable characters."""

    exit_code = 2
    is_fault = True  # whether it is told as an error
    of_one_rank = False  # whether a rank may have it alone and has to show it itself; else rank 0 shows it for all

    def __init__(self, message: str = "") -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        # Names of files and classes may hold sequences that command a terminal.
        super().__init__("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message))


class ConfigError(UserError, ValueError):
    """An unknown key or a value out of range."""


class LaunchError(UserError, RuntimeError):
    """Ranks that cannot be connected, for instance since the launcher's MPI is missing or is not mpi4py's."""

    of_one_rank = True


class OtherRankError(LaunchError):
    """Ranks that cannot be connected for a reason that another rank has, and shows."""

    of_one_rank = False


class MissingPackageError(UserError):
    """An optional package that is not installed."""

    def __init__(self, package: str, what: str) -> None:
        super().__init__(f"{what} need the package {package}, which is not installed: pip install {package}")


class DataError(UserError):
    """Training text that cannot be read or is too short."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete or damaged; names the file."""


class TrainingError(UserError, RuntimeError):
    """Training that cannot go on, such as a loss that is no number; says what to change."""

    exit_code = 1
