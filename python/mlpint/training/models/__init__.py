"""The models that ``mlpint train`` trains: plain PyTorch, unaware of layer-parallel training.

Each has its layers in the attribute ``blocks``, all of one :class:`Shape`; the translator's are its own, those of the
others :class:`mlpint.nn.Block`. May import :mod:`mlpint.nn`. Nothing here is public but by way of ``mlpint train``.
"""

from .bert import BERT
from .classifier import TextClassifier
from .gpt import GPT
from .shape import Shape
from .tagger import Tagger
from .translation import Translator
from .vit import ViT

__all__ = ["BERT", "GPT", "Shape", "Tagger", "TextClassifier", "Translator", "ViT"]
