"""Layer-parallel (MGRIT over depth) and multilevel training of transformers."""

from importlib.metadata import PackageNotFoundError, version

from . import testing
from .clip import clip_grad_norm_
from .comm import Comm, init
from .layer_parallel import LayerParallel
from .options import MGRIT
from .parallelize import parallelize

try:
    __version__ = version("mlpint")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["MGRIT", "Comm", "LayerParallel", "clip_grad_norm_", "init", "parallelize", "testing"]
