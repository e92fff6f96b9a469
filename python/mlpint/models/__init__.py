"""Models that ``mlpint train`` trains: plain PyTorch, unaware of layer-parallel training."""

from .gpt import GPT, Block

__all__ = ["GPT", "Block"]
