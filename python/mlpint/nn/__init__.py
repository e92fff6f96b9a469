"""Transformer blocks made for layer-parallel training."""

from .block import Block
from .stack import BlockStack

__all__ = ["Block", "BlockStack"]
