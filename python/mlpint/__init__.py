"""Layer-parallel (MGRIT over depth) and multilevel training of transformers."""

from importlib.metadata import PackageNotFoundError, version

from . import testing
from .comm import Comm, init
from .control import ErrorControl, gradient_bias
from .hf import parallelize
from .layers.arguments import PerLayer
from .layers.source import LayerFactory
from .mgrit import MGRIT
from .multilevel import Multilevel
from .parallel import (
    LayerParallel,
    average_gradients,
    averaged_gradients,
    capture,
    check_replicas,
    clip_grad_norm_,
    shard_loss,
    sync_replicas,
    trace,
)

try:
    __version__ = version("mlpint")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Comm",
    "ErrorControl",
    "LayerFactory",
    "LayerParallel",
    "MGRIT",
    "Multilevel",
    "PerLayer",
    "average_gradients",
    "averaged_gradients",
    "capture",
    "check_replicas",
    "clip_grad_norm_",
    "gradient_bias",
    "init",
    "parallelize",
    "shard_loss",
    "sync_replicas",
    "testing",
    "trace",
]
