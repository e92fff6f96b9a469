"""Transformer blocks made for layer-parallel training."""

from .block import Block
from .convert import from_transformers, to_transformers
from .encoder_decoder import DecoderBlock, EncoderBlock, EncoderDecoder
from .stack import BlockStack

__all__ = [
    "Block",
    "BlockStack",
    "DecoderBlock",
    "EncoderBlock",
    "EncoderDecoder",
    "from_transformers",
    "to_transformers",
]
