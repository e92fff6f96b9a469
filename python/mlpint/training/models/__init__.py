"""Models that ``mlpint train`` trains: plain PyTorch, unaware of layer-parallel training."""

from .bert import BERT
from .classifier import TextClassifier
from .gpt import GPT, Block
from .tagger import Tagger
from .translation import Translator
from .vit import ViT

__all__ = ["BERT", "Block", "GPT", "Tagger", "TextClassifier", "Translator", "ViT"]
