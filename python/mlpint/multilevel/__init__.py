"""Multilevel training: a deep network trained in alternation with its own coarse halves (arXiv 2504.18590)."""

from .multilevel import Multilevel
from .phase import Phase

__all__ = ["Multilevel", "Phase"]
