"""Errors that the person at the command line can mend: shown as one line, without a traceback."""


class UserError(Exception):
    """Wrong input of any kind; the message says what was wrong and what is allowed."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """An unknown key or a value out of range."""


class LaunchError(UserError, RuntimeError):
    """A launcher that does not fit: its MPI is missing, or is not the one that mpi4py loads."""


class DataError(UserError):
    """Training text that cannot be read or is too short."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete or damaged; names the file."""


class TrainingError(UserError, RuntimeError):
    """Training that cannot go on, such as a loss that is no number; says what to change."""

    exit_code = 1
