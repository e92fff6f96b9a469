"""What MkDocs is told of the docstrings: Sphinx's roles are names in code."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):\s*(?=<code>)")


def on_page_content(html: str, **unused: Any) -> str:
    """Called by MkDocs with each page."""
    return _ROLE.sub("", html)
