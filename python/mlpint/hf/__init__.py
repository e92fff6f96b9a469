"""Other people's models: a layer-parallel stack in the place of the list of layers of a Hugging Face or torch model.

May import :mod:`mlpint.checkpoint`, :mod:`mlpint.parallel` and what these may. Public: :func:`parallelize`,
:func:`save_pretrained`, :class:`TrainerMixin`. transformers and PEFT are not imported with it.
"""

from .parallelize import parallelize
from .saving import save_pretrained
from .trainer_mixin import TrainerMixin

__all__ = ["TrainerMixin", "parallelize", "save_pretrained"]
