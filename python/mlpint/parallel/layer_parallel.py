"""The drop-in module: a stack of residual layers spread over ranks and solved by MGRIT."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..comm.communicator import Comm
from ..comm.fingerprint import fingerprint
from ..layers.propagators import AnyStream, Stream
from ..layers.random_keys import LayerRandom
from ..layers.stack_evaluator import StackStream
from ..mgrit.layout import block_owners, cyclic_owners
from ..mgrit.learnt_operator import LearntOperator
from ..mgrit.options import MGRIT
from ..mgrit.solvers import AnySolver, block_solver, cyclic_solver
from ..mgrit.stats import Stats
from ..nn import BlockStack
from ..state import State
from .plain_pass import plain_pass
from .shared_parameters import SharedParameters, gather_state_dict
from .solve_pass import Run, Solve


class LayerParallel(nn.Module):
    """Runs ``for layer in layers: x = layer(x, *args, **kwargs)`` with the layers spread over ranks.

    Every rank runs the same script on the same batch: x is the same on every rank, and so is the result. Each rank
    keeps only its own layers. ``loss.backward()`` gives their parameters, x, and any tensor argument that requires it
    their gradients. With exact options the result is that of the plain loop; otherwise it is MGRIT's
    (arXiv 2601.09026).

    Args:
        layers: shape-preserving residual modules. The state they pass on is a tensor or a tuple of tensors; a layer
            whose state is one tensor may return a tuple that starts with it (Hugging Face). Or an
            :class:`mlpint.nn.BlockStack`, whose blocks are evaluated for all intervals of a rank at once.
        options: how the depth is solved; may be replaced between steps through :attr:`options`.

    Keyword args:
        comm: a :class:`mlpint.Comm`, an mpi4py communicator or a torch process group; by default the one that
            :func:`mlpint.init` found, or this process alone.
        step_size: h of x + h F(x), F(x) = layer(x) - x. At 1 the layer itself is called.
        open_layers, close_layers: so many first and last layers are swept serially, at step size 1, on the first and
            last rank ("buffer layers").
        layout: ``"block"``: each rank owns consecutive layers. ``"cyclic"``: groups of cfactor ranks own one layer of
            each interval each, so that the coarse operator ``"sum"``, which evaluates all layers of an interval at the
            same state, takes the time of one; the number of ranks must be a multiple of cfactor, or divide it.
        recompute: keep only the states and evaluate layers again for their gradients (activation checkpointing).
        serial_microbatches: exact sweeps go through the ranks as a pipeline of so many slices of the batch. Tensor
            arguments whose first dimension is the batch's are sliced along.

    A layer that has ``split_forward`` (see :class:`mlpint.layers.tapes.SplitTape`) does without the second input-vjp at
    C-points.

    Raises:
        ValueError: no layers, options out of range, or ranks that disagree on any of these.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module] | BlockStack,
        options: MGRIT | None = None,
        *,
        comm: Any = None,
        step_size: float = 1.0,
        open_layers: int = 0,
        close_layers: int = 0,
        layout: str = "block",
        recompute: bool = False,
        serial_microbatches: int = 1,
    ) -> None:
        super().__init__()
        whole = layers if isinstance(layers, BlockStack) else None
        layers = [layers] * len(whole) if whole is not None else list(layers)
        options = MGRIT() if options is None else options
        self.comm = Comm.of(comm)
        self.open_layers, self.close_layers = open_layers, close_layers
        self.step_size, self.recompute, self.serial_microbatches = step_size, recompute, serial_microbatches
        self._check(layers, options, layout)
        self.comm.vote(
            {
                "layers": f"{len(layers)} with {fingerprint(layers if whole is None else [whole])}",
                "options": str(options),
                "step size": str(step_size),
                "open and close layers": f"{open_layers} and {close_layers}",
                "layout": layout,
                "recompute": str(recompute),
                "serial microbatches": str(serial_microbatches),
            },
            "LayerParallel",
        )
        self._options = options
        self.watch_residuals = False
        self.stats = Stats()

        self.layer_count = len(layers)
        self.depth = len(layers) - open_layers - close_layers
        self.layout = layout
        granularity = options.cfactor if options.levels > 1 else 1
        if layout == "block":
            self._owners = block_owners(self.depth, granularity, self.comm.size)
        else:
            self._owners = cyclic_owners(self.depth, options.cfactor, self.comm.size)
        self.first_rank, self.last_rank = self._owners[0], self._owners[-1]
        self.local_indices = [n for n in range(len(layers)) if self.rank_of(n) == self.comm.rank]
        self.local_layers: dict[int, nn.Module] = {}
        self.stacked: BlockStack | None = None
        if whole is None:
            self.local_layers = {n: layers[n] for n in self.local_indices}
            for n, layer in self.local_layers.items():
                self.add_module(str(n), layer)
        else:
            self.stacked = whole.select(self.local_indices)
            self.stacked.saved_by_owner = True
        if self.idle_ranks and self.comm.rank == 0:
            warnings.warn(
                f"ranks {self.idle_ranks} own none of the {self.layer_count} layers: there are fewer intervals of "
                f"{granularity} layers than ranks. Take fewer ranks or a smaller cfactor",
                stacklevel=2,
            )
        self._shared = SharedParameters(layers if whole is None else [], self.rank_of, self.comm)
        self._solvers: dict[tuple, AnySolver] = {}
        self._learnt: dict[tuple[str, str], LearntOperator] = {}
        self._submodules: dict[int, list[nn.Module]] = {n: list(m.modules()) for n, m in self.local_layers.items()}

        seed = torch.tensor([torch.initial_seed() & (2**63 - 1)])
        if self.comm.size > 1:
            self.comm.transport.control.broadcast(State([seed]), 0)
        self.random = LayerRandom(int(seed))
        self._calls = 0
        self._next_key: tuple[int, int] | None = None
        self.recent_keys: deque[tuple[int, int]] = deque(maxlen=64)
        # What a rehearsal sets: the keys of its passes, and that coarse operators learn nothing from them.
        self.replayed_keys: Iterator[tuple[int, int]] | None = None
        self.learning = True
        # With several ranks the result requires gradients on all of them alike, whatever this rank's layers need.
        self.anchor = torch.zeros((), requires_grad=self.comm.size > 1)

    def _check(self, layers: list[nn.Module], options: MGRIT, layout: str) -> None:
        if not layers:
            raise ValueError("LayerParallel got no layers")
        for n, layer in enumerate(layers):
            if not isinstance(layer, nn.Module):
                raise TypeError(f"layer {n} is a {type(layer).__name__}, not a torch.nn.Module")
        if not isinstance(options, MGRIT):
            raise TypeError(f"options must be an mlpint.MGRIT, got {type(options).__name__}")
        if layout not in ("block", "cyclic"):
            raise ValueError(f"layout = {layout!r}: must be 'block' or 'cyclic'")
        size, cfactor = self.comm.size, options.cfactor
        if layout == "cyclic" and size % cfactor and cfactor % size:
            raise ValueError(
                f"layout='cyclic' deals the {cfactor} layers of an interval out to ranks: their number, {size}, "
                "must be a multiple of cfactor or divide it"
            )
        for name in ("open_layers", "close_layers"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be an integer of at least 0")
        if self.open_layers + self.close_layers >= len(layers):
            raise ValueError(
                f"open_layers + close_layers = {self.open_layers} + {self.close_layers} leaves none of the "
                f"{len(layers)} layers to the solver"
            )
        if isinstance(self.step_size, bool) or not isinstance(self.step_size, int | float) or not self.step_size > 0:
            raise ValueError(f"step_size = {self.step_size!r}: must be a positive number")
        if not isinstance(self.serial_microbatches, int) or self.serial_microbatches < 1:
            raise ValueError(f"serial_microbatches = {self.serial_microbatches!r}: must be an integer of at least 1")

    # --- who owns what -----------------------------------------------------------------------------------------------

    def rank_of(self, layer: int) -> int:
        """The rank that owns a layer."""
        return self._owners[min(max(layer - self.open_layers, 0), self.depth - 1)]

    @property
    def owns_first(self) -> bool:
        return self.comm.rank == self.first_rank

    @property
    def owns_last(self) -> bool:
        return self.comm.rank == self.last_rank

    @property
    def idle_ranks(self) -> list[int]:
        """Ranks without layers of their own: there are fewer intervals of cfactor layers than ranks."""
        busy = {self.rank_of(n) for n in range(self.layer_count)}
        return [r for r in range(self.comm.size) if r not in busy]

    @property
    def open_indices(self) -> range:
        return range(self.open_layers)

    @property
    def close_indices(self) -> range:
        return range(self.layer_count - self.close_layers, self.layer_count)

    def step_size_of(self, layer: int) -> float:
        """h of a layer; 1 for open and close layers."""
        serial = layer < self.open_layers or layer >= self.layer_count - self.close_layers
        return 1 if serial else self.step_size

    def __len__(self) -> int:
        return self.layer_count

    def extra_repr(self) -> str:
        return f"{self.layer_count} layers on {self.comm.size} ranks, {self.options}"

    # --- options and solvers -----------------------------------------------------------------------------------------

    @property
    def options(self) -> MGRIT:
        """How the depth is solved. Replace it on all ranks alike, between a backward and the next forward."""
        return self._options

    @options.setter
    def options(self, value: MGRIT) -> None:
        if not isinstance(value, MGRIT):
            raise TypeError(f"options must be an mlpint.MGRIT, got {type(value).__name__}")
        self._options = value

    def solver(self, direction: str) -> AnySolver:
        """The solver of a direction for the current options."""
        o = self._options
        key = (direction, o.cfactor, o.levels, o.relaxation, o.coarse, o.tolerance, self.watch_residuals)
        if key not in self._solvers:
            make = block_solver if self.layout == "block" else cyclic_solver
            self._solvers[key] = make(o, direction, self._owners, self.comm, norms=self.watch_residuals)
        return self._solvers[key]

    def learnt_operator(self, direction: str) -> LearntOperator | None:
        """What the coarse operator of the current options has learnt; None where it learns nothing."""
        kind = self._options.coarse
        if kind not in ("scaled", "fitted"):
            return None
        key = (direction, kind)
        if key not in self._learnt:
            self._learnt[key] = LearntOperator(kind, affine=direction == "forward")
        self._learnt[key].paused = not self.learning
        return self._learnt[key]

    def learnt_tensors(self) -> dict[str, torch.Tensor]:
        """What this rank's learnt coarse operators have learnt, for checkpoints; see :meth:`load_learnt_tensors`."""
        return {
            f"{direction}.{kind}.{name}": tensor
            for (direction, kind), operator in self._learnt.items()
            for name, tensor in operator.tensors()
        }

    def load_learnt_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what the ranks had learnt, however many they were, for the intervals that this rank starts."""
        self._learnt.clear()
        for direction, kind in {tuple(name.split(".")[:2]) for name in tensors}:
            prefix = f"{direction}.{kind}."
            owners = self._owners if direction == "forward" else self._owners[::-1]
            operator = self._learnt[direction, kind] = LearntOperator(kind, affine=direction == "forward")
            operator.load(
                {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
                lambda position, owners=owners: owners[position] == self.comm.rank,
            )

    def stream(self, arguments: tuple[tuple, dict], extras: tuple[torch.Tensor, ...], **options: Any) -> AnyStream:
        """What takes one batch through this rank's layers; see :class:`mlpint.layers.propagators.Stream`."""
        options |= {"recompute": self.recompute, "random": self.random}
        if self.stacked is None:
            parameters = self.trainable_parameters() if options["record"] else {}
            return Stream(self.local_layers, self.step_size_of, arguments, extras, parameters, **options)
        return StackStream(self.stacked, self.step_size_of, arguments, **options)

    # --- the pass ----------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor | tuple[torch.Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        """The state after the last layer, in the form of x and the same on every rank.

        Args:
            x: state before the first layer, of any shape, the same on every rank.
            *args, **kwargs: passed to every layer.
        """
        single = isinstance(x, torch.Tensor)
        state = (x,) if single else tuple(x)
        if not state or not all(isinstance(t, torch.Tensor) for t in state):
            raise TypeError("the state must be a tensor or a tuple of tensors")
        self.stats = Stats()
        if self.comm.size == 1 and self.options.exact and self.serial_microbatches == 1 and not self.recompute:
            outputs = plain_pass(self, state, single, args, kwargs)
            return outputs[0] if single else outputs
        grad = torch.is_grad_enabled()
        run = Run(self, state, single, args, kwargs, grad)
        outputs = Solve.apply(run, self.anchor, *state, *run.extras, *run.weights)
        return outputs[0] if single else outputs

    def trainable_parameters(self) -> dict[int, tuple[nn.Parameter, ...]]:
        """Own parameters that require gradients now, by layer, in the order of ``layer.parameters()``.

        Stacked parameters, those of several layers, are the first layer's here; see :meth:`by_layer`.
        """
        if self.stacked is not None:
            found = tuple(p for p in self.stacked.weights() if p.requires_grad)
            return {self.local_indices[0]: found} if self.local_indices else {}
        return {
            n: tuple(dict.fromkeys(p for m in ms for p in m._parameters.values() if p is not None and p.requires_grad))
            for n, ms in self._submodules.items()
        }

    def by_layer(self, tensors: Mapping[int, tuple[torch.Tensor | None, ...]]) -> dict[int, tuple]:
        """Something for each of :meth:`trainable_parameters`, or of all own parameters, cut up into single layers'."""
        if self.stacked is None or not self.local_indices:
            return dict(tensors)
        stacked = tensors.get(self.local_indices[0], ())
        return {n: tuple(t if t is None else t[i] for t in stacked) for i, n in enumerate(self.local_indices)}

    def gradients(self) -> dict[int, dict[nn.Parameter, torch.Tensor]]:
        """``.grad`` of own parameters by layer: of a stacked parameter a layer has its row."""
        if self.stacked is not None:
            held = {p: p.grad for p in self.stacked.weights() if p.grad is not None}
            return {n: {p: g[i] for p, g in held.items()} for i, n in enumerate(self.local_indices)}
        return {
            n: {p: p.grad for p in layer.parameters() if p.grad is not None} for n, layer in self.local_layers.items()
        }

    def sum_shared_parameters(self, gradients: dict[torch.Tensor, torch.Tensor]) -> None:
        """Adds up, over the ranks that hold it, the gradient of a parameter that layers of several ranks share."""
        self._shared.sum(gradients)

    @property
    def shared_parameters(self) -> list[tuple[nn.Parameter, list[int]]]:
        """Own parameters that layers of other ranks use too, with the ranks that hold them."""
        return self._shared.parameters

    # --- dropout -----------------------------------------------------------------------------------------------------

    def dropout_key(self, step: int, microbatch: int = 0) -> None:
        """Keys the random numbers of the next pass; without it passes are counted. Same on every rank."""
        self._next_key = (step, microbatch)

    def next_key(self) -> tuple[int, tuple[int, int]]:
        """Number of this pass and its (step, microbatch)."""
        if self.replayed_keys is not None:
            replayed = next(self.replayed_keys)
            key, self._next_key = self._next_key or replayed, None
            return self._calls, key
        self._calls += 1
        # Counted passes use a microbatch that no training loop reaches, so that the two kinds of key never meet.
        key, self._next_key = self._next_key or (self._calls, 1 << 40), None
        self.recent_keys.append(key)
        return self._calls, key

    def train(self, mode: bool = True) -> LayerParallel:
        self.random.forget()
        return super().train(mode)

    # --- copies and checkpoints --------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The parameters of all layers under the keys of the unwrapped layers. Collective: call it on every rank."""
        if args:
            raise TypeError("state_dict takes destination, prefix and keep_vars as keyword arguments only")
        local = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        whole = gather_state_dict(local, self.comm, prefix)
        if destination is None:
            return whole
        destination.update(whole)
        return destination

    def local_state_dict(self, prefix: str = "") -> Any:
        """The part of :meth:`state_dict` that this rank owns; not collective."""
        return super().state_dict(prefix=prefix)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.stacked is not None:
            self.stacked.save_rows(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # Layers of other ranks are no concern here; their keys must still be those of layers that exist.
        for name in state_dict:
            if name.startswith(prefix):
                index, _, parameter = name[len(prefix) :].partition(".")
                exists = index.isdigit() and int(index) < self.layer_count
                if not exists or self.stacked is not None and parameter not in self.stacked.row_names:
                    unexpected.append(name)
        if self.stacked is not None:
            self.stacked.load_rows(state_dict, prefix, missing, errors)

    def __deepcopy__(self, memo: dict) -> LayerParallel:
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            if name == "_solvers":
                clone.__dict__[name] = {}
            elif name == "comm":
                clone.__dict__[name] = value
            else:
                clone.__dict__[name] = copy.deepcopy(value, memo)
        return clone
