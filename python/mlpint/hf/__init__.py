"""Other people's models: a layer-parallel stack in the place of the list of layers of a Hugging Face or torch model.

May import :mod:`mlpint.parallel` and what that may. Public: :func:`parallelize`.
"""

from .parallelize import parallelize

__all__ = ["parallelize"]
