"""Training text as tokens: where it comes from, how it is split and how batches are drawn from it."""

from .batches import Batches
from .corpus import Corpus, load

__all__ = ["Batches", "Corpus", "load"]
