"""Transformer blocks made for layer-parallel training."""

from .block import Block
from .convert import from_transformers, to_transformers
from .stack import BlockStack

__all__ = ["Block", "BlockStack", "from_transformers", "to_transformers"]
