"""Steps that succeed on all ranks or fail on all of them, so that an error ends a run cleanly and once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from .communicator import Comm


def collectively(comm: Comm, action: Callable[[], Any]) -> list[Any]:
    """Runs ``action`` on every rank. Collective.

    Args:
        comm: the ranks.
        action: returns something that JSON can hold.

    Returns:
        What it returned, by rank.

    Raises:
        UserError: on every rank, if it raised one or an OSError on any: the error of the lowest such rank.
    """
    error: UserError | None = None
    result = None
    try:
        result = action()
    except UserError as raised:
        error = raised
    except OSError as raised:
        error = UserError(f"{raised.filename or 'files'}: {raised.strerror or raised}")
    own = {"result": result} if error is None else {"error": str(error), "class": type(error).__name__}
    outcomes = [json.loads(message) for message in comm.gather(json.dumps(own).encode())]
    kinds: list[type[UserError]] = [UserError, *UserError.__subclasses__()]
    for outcome in outcomes:
        if "error" in outcome:
            kind = next((kind for kind in kinds if kind.__name__ == outcome["class"]), UserError)
            raise kind(outcome["error"]) from error
    return [outcome["result"] for outcome in outcomes]
