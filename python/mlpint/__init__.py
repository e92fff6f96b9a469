"""Layer-parallel (MGRIT over depth) and multilevel training of transformers."""

from importlib.metadata import PackageNotFoundError, version

from . import testing
from .clip import clip_grad_norm_
from .comm import Comm, init
from .error_control import ErrorControl
from .graphs import capture
from .layer_parallel import LayerParallel
from .multilevel import Multilevel
from .options import MGRIT
from .parallelize import parallelize
from .replicas import check_replicas, sync_replicas

try:
    __version__ = version("mlpint")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Comm",
    "ErrorControl",
    "LayerParallel",
    "MGRIT",
    "Multilevel",
    "capture",
    "check_replicas",
    "clip_grad_norm_",
    "init",
    "parallelize",
    "sync_replicas",
    "testing",
]
