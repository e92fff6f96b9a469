"""The text that every CPython carries, so that a run needs no download: its language reference and its own sources."""

from __future__ import annotations

import importlib
import sysconfig
from pathlib import Path

from ...errors import DataError


def embedded_text() -> bytes:
    """About 5 MB of English and Python, in an order that does not depend on the machine.

    Raises:
        DataError: on a Python without its sources.
    """
    topics: dict[str, str] = {}
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        pass  # some distributions leave the reference out; the sources are ten times larger
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not sources:
        raise DataError("this Python carries no library sources to train on; name a text with --data PATH")
    parts = [topics[name].encode() for name in sorted(topics)]
    parts += [path.read_bytes() for path in sources]
    return b"\n".join(parts)
