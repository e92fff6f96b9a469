"""The ranks of a job: how they were launched, what connects them, and how they agree and fail together.

A transport (MPI, NCCL, a torch process group, or one staged through host memory) moves states between ranks; all else
is built on it. Imports nothing of mlpint but :mod:`mlpint.errors`, :mod:`mlpint.state` and the C++ core. Public:
:class:`Comm` and :func:`init`.
"""

from .communicator import Comm
from .start import init

__all__ = ["Comm", "init"]
