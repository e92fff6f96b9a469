"""Conformance of a user's block, as in ``mlpint.testing.check_block(block, x)``."""

from .parallel.testing import check_block

__all__ = ["check_block"]
