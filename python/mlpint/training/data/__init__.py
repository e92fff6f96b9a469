"""Training data: where they come from, how a part is held out, and how batches are drawn from them.

A file a kind of data (text, byte pairs, treebanks, labelled texts, images, parallel text), over files, a cache and data
sets of Hugging Face. Batches and their order are functions of the seed and a position alone, so that all ranks draw the
same ones and a run can go on anywhere. May import :mod:`mlpint.comm` and :mod:`mlpint.errors`. Nothing here is public
but by way of ``mlpint train``.
"""

from .batches import Batches
from .corpus import Corpus, load

__all__ = ["Batches", "Corpus", "load"]
