"""The layer-parallel stack: the drop-in module, its passes, and what ranks do together around it.

The pass through the solver, the exact pass of a process alone, shared parameters, the sharded head, clipping, replicas,
the data x layer mesh, CUDA graphs and the conformance test of a user's block. May import :mod:`mlpint.layers` and what
that may. Public: :class:`LayerParallel`, :func:`average_gradients`, :func:`averaged_gradients`, :func:`capture`,
:func:`clip_grad_norm_`, :func:`check_replicas`, :func:`shard_loss`, :func:`sync_replicas`, :func:`trace` and
:mod:`mlpint.testing`.
"""

from . import foreign_clipping, loss_scaling  # noqa: F401 (at work once a stack of several ranks is called)
from .clip import clip_grad_norm_
from .cuda_graphs import capture
from .data_parallel import average_gradients, averaged_gradients
from .layer_parallel import LayerParallel
from .replicas import check_replicas, sync_replicas
from .shard_loss import shard_loss
from .trace import trace

__all__ = [
    "LayerParallel",
    "average_gradients",
    "averaged_gradients",
    "capture",
    "check_replicas",
    "clip_grad_norm_",
    "shard_loss",
    "sync_replicas",
    "trace",
]
