"""The C++ core: the MGRIT solver and the transports. tests/test_package.py holds this file to the compiled module."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Protocol

USER_TAG: Final[int]
"""First of the message tags that Python may use, up to 63; those below are the core's own."""

class _State(Protocol):
    """Anything that says which memory it stands for; :class:`mlpint.state.State` does."""

    def buffers(self) -> Sequence[tuple[int, int, int]]:
        """Contiguous memory as (pointer, bytes, device index or -1 for the host)."""

class _Propagator(Protocol):
    """The steps that a solver takes; states are whatever Python objects the propagator makes of them."""

    def evaluate(
        self, positions: list[int], inputs: list[Any], outputs: list[Any], level: int, sweep: Sweep, slice: int, /
    ) -> list[Any]:
        """Takes independent fine steps, all at once. An output that an earlier sweep found at the same input is given,
        the others are None. The states are those of a slice of the batch, or of the whole where it is -1."""
    def extrapolate(self, u: Any, v: Any, length: int, /) -> Any:
        """u + length (v - u)."""
    def axpy(self, a: float, x: Any, y: Any, /) -> Any:
        """a x + y."""
    def squared_norm(self, x: Any, /) -> float: ...
    def empty(self, slice: int, /) -> Any:
        """Memory for a state, or a slice of one, to be received."""
    def slices(self) -> int:
        """In how many slices of the batch chains go through the ranks."""
    def slice(self, x: Any, index: int, /) -> Any: ...
    def join(self, slices: list[Any], /) -> Any: ...
    def finishes_on_chain(self) -> bool:
        """Whether a step visited in the chain and in the final fine sweep is dearer than one visit in the latter."""
    def learns(self) -> bool:
        """Whether a learnt coarse operator wants to observe the coarse steps of this solve."""
    def learnt_step(self, position: int, length: int, u: Any, v: Any, /) -> Any:
        """A coarse step from u, where the fine step from u arrives at v."""
    def observe(self, position: int, length: int, u: Any, v: Any, end: Any, /) -> None:
        """Shows the operator where the fine steps of one coarse step arrive."""

class _PythonTransfer(Protocol):
    def test(self) -> bool: ...
    def wait(self, seconds: float, /) -> object: ...

class _PythonTransportMethods(Protocol):
    """What a transport written in Python has. The core's own messages arrive as memoryviews, not as states."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def send(self, to: int, tag: int, state: Any, /) -> _PythonTransfer: ...
    def receive(self, source: int, tag: int, state: Any, /) -> _PythonTransfer: ...

class TransferError(RuntimeError):
    """A transfer that did not complete; the message names both ranks."""

class Sweep:
    """Why a fine step is evaluated: a propagator does no more work than the sweep asks for.

    ``intermediate``: a value that later sweeps replace. ``final_coarse``: at a value that changes no more, on the
    critical path, so that only the value is wanted at once. ``final_fine``: at a value that changes no more; everything
    still owed (graph, parameter gradients) is done now.
    """

    intermediate: ClassVar[Sweep]
    final_coarse: ClassVar[Sweep]
    final_fine: ClassVar[Sweep]
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Transfer:
    """One transfer under way."""

    def test(self) -> bool:
        """Lets it move on without blocking; true once it is complete."""
    def wait(self, seconds: float, /) -> None:
        """Raises TransferError after so many seconds without completion."""

class Transport:
    """Moves states between ranks: posts sends and receives, which complete in order."""

    stall_limit: float
    """Seconds that a rank waits for another before it gives up."""
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def control(self) -> Transport:
        """The transport for small messages in host memory; itself, unless this one moves an accelerator's memory."""
    def post(self, to: int, tag: int, state: _State, /) -> None:
        """Sends without waiting; the state is kept until it has left."""
    def receive(self, source: int, tag: int, into: _State, /) -> Transfer: ...
    def broadcast(self, state: _State, root: int, /) -> None: ...
    def sum(self, value: float, /) -> float:
        """The sum over all ranks, added up in the same order everywhere."""
    def progress(self) -> None:
        """Lets messages under way move on."""
    def flush(self) -> None:
        """Waits until every posted message has left."""
    def set_watch(self, watch: Callable[[int, float], None], /) -> None:
        """Has ``watch(peer, waited)`` called now and then while this rank waits for a peer; it may raise.

        ``waited``: seconds since this wait began.
        """

class SelfTransport(Transport):
    """One process alone."""

    def __init__(self) -> None: ...

class MpiTransport(Transport):
    """MPI, by the library that mpi4py has loaded.

    Args:
        module: path of mpi4py's extension module.
        comm: handle of the communicator.
        byte: handle of MPI_BYTE.
    """

    def __init__(self, module: str, comm: int, byte: int) -> None: ...

class PythonTransport(Transport):
    """A transport written in Python."""

    def __init__(self, methods: _PythonTransportMethods, /) -> None: ...

class NcclLibrary:
    """The first of ``candidates`` (file names or paths) that is loaded already, else the first that can be loaded.

    Raises RuntimeError if there is none.
    """

    def __init__(self, candidates: Sequence[str]) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def version(self) -> int:
        """As NCCL codes it: 22703 is 2.27.3."""
    def unique_id(self) -> bytes:
        """Made on one rank, handed to all."""

class NcclTransport(Transport):
    """NCCL on the current stream. Collective: returns once every rank has joined.

    Args:
        control: transport between the same ranks for host memory.
        device: index of the GPU, which must be the current one; -1 for host memory (a substitute for NCCL).
        stream: gives the current stream as an integer at each transfer.
    """

    def __init__(
        self, library: NcclLibrary, control: Transport, unique_id: bytes, device: int, stream: Callable[[], int]
    ) -> None: ...
    @property
    def device(self) -> int: ...
    def check(self) -> None:
        """Raises TransferError if NCCL has found a transfer to have failed."""
    def abort(self) -> None:
        """Ends what is enqueued, now, without telling the other ranks."""
    def close(self) -> None:
        """Waits for what is enqueued, unless a transfer has failed; the transport cannot be used any more."""

class Grid:
    """The levels: which points of depth each of them keeps."""

    def __init__(self, steps: int, cfactor: int, levels: int) -> None: ...
    @property
    def levels(self) -> int: ...
    def steps(self, level: int) -> int: ...
    def position(self, level: int, point: int) -> int:
        """Depth of a point, in layers from the start."""
    def length(self, level: int, step: int) -> int:
        """Layers that a step spans."""
    def mirrored(self) -> Grid:
        """The same intervals from the other end: the grid of the adjoint."""

class Partition:
    """Contiguous ownership: slot s owns the steps from depth ``offsets[s]`` up to ``offsets[s + 1]`` on every level."""

    def __init__(self, offsets: Sequence[int], steps: int) -> None: ...
    @staticmethod
    def even(steps: int, granularity: int, slots: int) -> list[int]:
        """Offsets that deal out whole intervals of ``granularity`` steps; the earlier slots take what is left over."""
    def owner(self, position: int) -> int: ...
    def mirrored(self) -> Partition: ...

class SolveResult:
    @property
    def final_value(self) -> Any:
        """State at the last point, on the rank that owns the last step; None elsewhere."""
    @property
    def iterations(self) -> int: ...
    @property
    def residual_norms(self) -> list[float]:
        """After iteration 1, 2, ...; empty unless asked for."""
    @property
    def waited(self) -> float:
        """Seconds that this rank waited for others."""
    @property
    def waits(self) -> list[tuple[float, float, str, int, int]]:
        """Begin and end on the clock of ``time.perf_counter``, operation, level and iteration of each wait; empty
        unless :func:`note_waits` is on."""
    @property
    def sent(self) -> list[tuple[float, int, str, int, int]]:
        """Time, receiver, operation, level and iteration of each message that was sent from rank to rank; likewise."""

def note_waits(on: bool) -> None:
    """Has the solvers of this process note each wait and message, or stop doing so."""

class Solver:
    """MGRIT for contiguous ownership; ``ranks[s]`` is the rank at slot s along the direction of the solve.

    Args:
        coarse: name of the coarse operator.
        fcf: FCF- in place of F-relaxation.
        tolerance: stop once the residual norm is at most this times the norm of the initial value.
        norms: report residual norms, which costs an all-reduce an iteration.
    """

    def __init__(
        self,
        grid: Grid,
        partition: Partition,
        ranks: Sequence[int],
        transport: Transport,
        coarse: str,
        fcf: bool,
        tolerance: float,
        norms: bool,
    ) -> None: ...
    def solve(self, propagator: _Propagator, initial: Any, iterations: int) -> SolveResult:
        """From the value of point 0, given on the rank that owns it and None elsewhere."""
    @property
    def where(self) -> tuple[str, int, int]:
        """What this rank is doing: operation, level, depth along the direction of the solve."""
    @property
    def iteration(self) -> int:
        """From 1; 0 in exact sweeps."""

class CyclicSolver:
    """Two-level MGRIT with the ``sum`` operator; ``owners[p]`` is the rank that owns the fine step from depth p."""

    def __init__(
        self, grid: Grid, owners: Sequence[int], transport: Transport, tolerance: float, norms: bool
    ) -> None: ...
    def solve(self, propagator: _Propagator, initial: Any, iterations: int) -> SolveResult: ...
    @property
    def where(self) -> tuple[str, int, int]: ...
    @property
    def iteration(self) -> int: ...
