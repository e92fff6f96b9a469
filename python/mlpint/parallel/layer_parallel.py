"""The drop-in module: a stack of residual layers spread over ranks and solved by MGRIT."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NoReturn, Self, SupportsIndex

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..comm.communicator import Comm
from ..comm.fingerprint import checksum
from ..layers.arguments import check_arguments, has_arguments_by_layer, selected
from ..layers.consistency import intervals_of
from ..layers.random_keys import LayerRandom
from ..layers.source import LayerFactory, LayerSource
from ..layers.store import LayerStore
from ..mgrit.layout import Layout, interval
from ..mgrit.learnt_operators import LearntOperators
from ..mgrit.options import MGRIT
from ..mgrit.solvers import AnySolver, Solvers
from ..mgrit.stats import Stats
from ..nn import BlockStack, EncoderDecoder
from . import spread_stacks
from .compiled import not_compiled
from .conditions import Conditions, PassSetup
from .optimizer_marks import mark_states
from .pass_checks import POOR_GRADIENTS
from .pass_keys import CheckpointedPasses, PassKeys, in_backward
from .plain_pass import is_plain, plain_pass
from .replica_watch import ReplicaWatch
from .shared_parameters import SharedParameters, gather_state_dict
from .solve_pass import SolveFunction, SolvePass
from .ties import tied_outside
from .wrappers import keep_layers_out_of_ddp, refuse_peft


class LayerParallel(nn.Module):
    """Runs ``for layer in layers: x = layer(x, *args, **kwargs)`` with the layers spread over ranks.

    Every rank runs the same script on the same batch: x is the same on every rank, and so is the result. Each rank
    keeps only its own layers. ``loss.backward()`` gives their parameters, x, and any tensor argument that requires it
    their gradients. With exact options the result is that of the plain loop; otherwise it is MGRIT's
    (arXiv 2601.09026).

    Args:
        layers: shape-preserving residual modules. The state they pass on is a tensor or a tuple of tensors; a layer
            whose state is one tensor may return a tuple that starts with it (Hugging Face). Or an
            :class:`mlpint.nn.BlockStack` or ``EncoderDecoder``, whose blocks are evaluated for all intervals of a rank
            at once. Or a :class:`mlpint.LayerFactory`, of which each rank makes its own layers alone.
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
        chain_slices: coarse sweeps go through the ranks in so many slices of the batch, which divides the time that
            ranks wait for their turn; layers must treat samples independently. Exact sweeps do as with
            ``serial_microbatches``. "auto": in the first pass with a batch of some size the fastest number is found by
            measurement, so that runs may differ from each other by rounding.
        serial_microbatches: exact sweeps go through the ranks as a pipeline of so many slices of the batch. Tensor
            arguments whose first dimension is the batch's are sliced along.
        consistency: mu, at least 0; adds mu mean_K ||e_K||^2 / ||end - u_K||^2 to what gradients are of, so that the
            coarse model stays true as layers are trained, see :mod:`mlpint.layers.consistency`. In units of the loss
            that ``backward`` is called on: divide it by the number of accumulated batches, multiply it by a
            ``GradScaler``'s scale. May be set between steps, on all ranks alike.

    A layer that has ``split_forward`` (see :class:`mlpint.layers.tapes.SplitTape`) does without the second input-vjp at
    C-points.

    Raises:
        ValueError: no layers, options out of range, or ranks that disagree on any of these.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module] | BlockStack | EncoderDecoder | LayerFactory,
        options: MGRIT | None = None,
        *,
        comm: Any = None,
        step_size: float = 1.0,
        open_layers: int = 0,
        close_layers: int = 0,
        layout: str = "block",
        recompute: bool = False,
        serial_microbatches: int = 1,
        chain_slices: int | Literal["auto"] = 1,
        consistency: float = 0.0,
    ) -> None:
        super().__init__()
        source = LayerSource(layers)
        options = MGRIT() if options is None else options
        if not isinstance(options, MGRIT):
            raise TypeError(f"options must be an mlpint.MGRIT, got {type(options).__name__}")
        self.comm = comm = Comm.of(comm)
        dealt = Layout.deal(layout, len(source), comm.size, options, open_layers, close_layers, step_size)
        self._store = source.store(dealt.local_indices(comm.rank), comm.world)
        seed = comm.broadcast(torch.tensor([torch.initial_seed() & (2**63 - 1)], device="cpu"))  # rank 0's
        self._layer_random = LayerRandom(int(seed))
        self.conditions = Conditions(
            dealt, self._store, self._layer_random, options, recompute, serial_microbatches, chain_slices, consistency
        )
        if consistency:
            intervals_of(dealt, options)
        alike = {
            "layers": source.description,
            "options": options,
            "step size": step_size,
            "open and close layers": f"{open_layers} and {close_layers}",
            "layout": layout,
            "recompute": recompute,
            "serial microbatches": serial_microbatches,
            "chain slices": chain_slices,
            "consistency": consistency,
        }
        comm.world.vote({name: str(value) for name, value in alike.items()}, "LayerParallel")
        # Unless a state dict is loaded the first pass refuses weights that were not alike.
        digest = checksum(source.modules) if source.whole else ""
        self._first_weights = [message.decode() for message in comm.world.gather(digest.encode())]
        self._replica_watch = ReplicaWatch(comm.data)
        self._store.register(self)
        if dealt.idle_ranks and comm.world.rank == 0:
            warnings.warn(
                f"ranks {dealt.idle_ranks} own none of the {len(source)} layers: there are fewer intervals of "
                f"{interval(options)} layers than ranks. Take fewer ranks or a smaller cfactor",
                stacklevel=2,
            )
        self._layer_count = len(source)
        # Attention that takes (sequence, batch, features), torch's own by default.
        self._sequence_first = any(
            getattr(m, "batch_first", True) is False for module in (source.modules or [self]) for m in module.modules()
        )
        self.stats = Stats()
        self.pass_keys, self._checkpointed = PassKeys(comm.data.rank), CheckpointedPasses()
        self._done: set[str] = set()
        self.gradients_ready: Callable[[dict[Any, torch.Tensor]], None] | None = None  # see averaged_gradients
        self._slices_found: dict[int, int] = {}
        self._solvers, self._operators = Solvers(comm), LearntOperators(comm.rank)
        self._shared = SharedParameters(source.modules, dealt.rank_of, comm)
        # With several ranks the result requires gradients on all of them alike, whatever this rank's layers need.
        self.anchor = torch.zeros((), device="cpu", requires_grad=comm.size > 1)
        if comm.size > 1:
            keep_layers_out_of_ddp(LayerParallel)
            mark_states(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """A layer is replaced by its index, ``setattr(stack, "3", layer)``, on all ranks; its owner takes it up.

        Raises:
            AttributeError: a layer that does not exist, or blocks whose parameters are stacked.
        """
        if isinstance(value, nn.Module) and name.isdigit():
            stacked = any(isinstance(module, BlockStack) for module in self._modules.values())
            if int(name) >= self._layer_count or stacked:
                what = "blocks with stacked parameters" if stacked else f"{self._layer_count} layers"
                raise AttributeError(f"layer {name} of a stack of {what} cannot be replaced")
            if name not in self._modules:
                return
        if isinstance(self._modules.get(name), BlockStack) and self._modules[name] is not value:
            raise AttributeError(
                "the blocks of a LayerParallel stack cannot be replaced: load a state dict, or wrap anew"
            )
        super().__setattr__(name, value)

    # --- what runs, and how ------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, **changes: Any) -> Iterator[None]:
        """Inside, the stack runs under other conditions; what was changed is put back at the end, come what may.

        A backward goes by the conditions of its forward. On all ranks alike; may be nested.

        Args:
            **changes: attributes of :class:`mlpint.parallel.conditions.Conditions` with their values: options, keys,
                learning, watch_residuals, serial_microbatches, chain_slices, consistency, recompute, layer_random, or a
                layout that :meth:`mlpint.mgrit.layout.Layout.select` has made of the whole stack's.
        """
        with ExitStack() as leaving:
            if "layout" in changes:
                layers = changes["layout"].layers
                changes["store"] = leaving.enter_context(self._store.select(layers))
                changes["layer_random"] = self._layer_random.select(layers)
            before = {name: getattr(self.conditions, name) for name in changes}
            self._change(**changes)
            try:
                yield
            finally:
                self._change(**before)

    def _change(self, **changes: Any) -> None:
        self.conditions = dataclasses.replace(self.conditions, **changes)

    @property
    def options(self) -> MGRIT:
        """How the depth is solved. Replace it on all ranks alike, between a backward and the next forward."""
        return self.conditions.options

    @options.setter
    def options(self, value: MGRIT) -> None:
        self._change(options=value)

    @property
    def watch_residuals(self) -> bool:
        """Whether residual norms are computed, even if no tolerance needs them."""
        return self.conditions.watch_residuals

    @watch_residuals.setter
    def watch_residuals(self, value: bool) -> None:
        self._change(watch_residuals=value)

    @property
    def consistency(self) -> float:
        """mu of the consistency term; 0: there is none."""
        return self.conditions.consistency

    @consistency.setter
    def consistency(self, value: float) -> None:
        if value:
            intervals_of(self.layout, self.options)
        self._change(consistency=value)

    def looked_after(self) -> None:
        """Says that the error of the gradients is known or watched, so that nobody needs to be warned of it."""
        self._done.add(POOR_GRADIENTS)

    def relative_error(self) -> float:
        """The mean over intervals of ||e_K|| / ||end - u_K|| in the last pass with a consistency term. Collective."""
        own = self.stats.relative_errors.values()
        sums = torch.tensor([sum(own), len(own)], dtype=torch.float64, device="cpu")
        self.comm.world.sum_ordered([sums])
        return float(sums[0] / sums[1])

    @property
    def layout(self) -> Layout:
        """Who owns which layer."""
        return self.conditions.layout

    @property
    def store(self) -> LayerStore:
        """This rank's layers."""
        return self.conditions.store

    @property
    def local_layers(self) -> Mapping[int, nn.Module]:
        """This rank's layers by index; empty where their parameters are stacked."""
        return self.store.modules

    @property
    def layer_random(self) -> LayerRandom:
        """The layers' random numbers."""
        return self.conditions.layer_random

    def rank_of(self, layer: int) -> int:
        """The rank that owns a layer."""
        return self.layout.rank_of(layer)

    def step_size_of(self, layer: int) -> float:
        """h of a layer; 1 for open and close layers."""
        return self.layout.step_size_of(layer)

    @property
    def shared_parameters(self) -> list[tuple[nn.Parameter, list[int]]]:
        """Own parameters that layers of other ranks use too, with the ranks that hold them."""
        return self._shared.parameters

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            "a LayerParallel stack is called, x = blocks(x, ...), in the place of the loop over its layers: most of "
            "them are on other ranks, and it is their solver. Those of this rank are in blocks.local_layers"
        )

    def __iter__(self) -> Iterator[Any]:
        return self[0]

    def extra_repr(self) -> str:
        return f"{len(self)} layers on {self.comm.size} ranks, {self.options}"

    # --- solvers and what they learn ---------------------------------------------------------------------------------

    def solver(self, direction: str) -> AnySolver:
        """The solver of a direction ("forward" or "backward") as things are; raises what the next pass would raise."""
        return self._solvers.solver(self.layout, self.options, direction, norms=self.watch_residuals)

    def learnt_tensors(self, layout: Layout | None = None) -> dict[str, torch.Tensor]:
        """What this rank's learnt coarse operators have learnt, for checkpoints; on the present layout by default."""
        return self._operators.tensors(layout or self.layout)

    def load_learnt_tensors(self, tensors: Mapping[str, torch.Tensor], layout: Layout | None = None) -> None:
        """Takes up what the ranks had learnt, however many they were, for the intervals that this rank starts."""
        self._operators.load(layout or self.layout, tensors)

    # --- the pass ----------------------------------------------------------------------------------------------------

    @not_compiled
    def forward(self, x: torch.Tensor | tuple[torch.Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        """The state after the last layer, in the form of x and the same on every rank.

        Args:
            x: state before the first layer, of any shape, the same on every rank.
            *args, **kwargs: passed to every layer; one that differs from layer to layer as
                :class:`mlpint.PerLayer`.
        """
        single = isinstance(x, torch.Tensor)
        state = (x,) if single else tuple(x)
        if not state or not all(isinstance(t, torch.Tensor) for t in state):
            raise TypeError("the state must be a tensor or a tuple of tensors")
        for tensor in state:
            if tensor.is_complex():
                raise ValueError(f"the state is {tensor.dtype}: a layer-parallel stack moves real numbers alone")
        if has_arguments_by_layer(args, kwargs):
            check_arguments(args, kwargs, self._layer_count)
            args, kwargs = selected(args, kwargs, self.layout.layers)
        if self.comm.size > 1:
            spread_stacks.register(self)
        if len(set(self._first_weights)) > 1:
            raise RuntimeError(
                f"the ranks made their LayerParallel of layers with unlike weights (digests {self._first_weights}): "
                "seed all ranks alike before the layers are made, or load one state dict on all of them"
            )
        for name in ("serial_microbatches", "chain_slices") if self._sequence_first else ():
            if (count := getattr(self.conditions, name)) != 1:
                raise ValueError(
                    f"{name} = {count} cuts along the first dimension, which is the sequence for layers with "
                    "batch_first=False: make them with batch_first=True"
                )
        keys = self.conditions.keys
        if not self._replica_watch.is_over and self.training and torch.is_grad_enabled() and keys is None:
            given = [*state, *(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))]
            self._replica_watch.look(given, [*self.parameters()])
        self.stats = Stats()
        if keys is None and in_backward():  # a checkpoint around the stack runs an earlier pass again
            keys = iter([self._checkpointed.repeated_key(state)])
        number, key = self.pass_keys.next(keys, self.training)
        if keys is None:
            self._checkpointed.note(state, key)
        setup = PassSetup(
            self.conditions,
            self.comm,
            self._solvers,
            self._operators,
            self._shared,
            number,
            key,
            self.training,
            self._done,
            self._slices_found,
            functools.partial(tied_outside, self, LayerParallel),
            lambda: self.gradients_ready,
            self.stats,
        )
        if is_plain(self.conditions):
            outputs = plain_pass(setup, state, single, args, kwargs)
        else:
            solve_pass = SolvePass(setup, state, single, args, kwargs, torch.is_grad_enabled())
            outputs = SolveFunction.apply(solve_pass, self.anchor, *state, *solve_pass.extras, *solve_pass.weights)
        return outputs[0] if single else outputs

    def dropout_key(self, step: int, microbatch: int = 0) -> None:
        """Keys the random numbers of the next pass; without it passes are counted. Same on every rank of a replica."""
        self.pass_keys.choose(step, microbatch)

    def train(self, mode: bool = True) -> Self:
        self.layer_random.forget()
        return super().train(mode)

    # --- copies ------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerParallel:
        clone = memo[id(self)] = type(self).__new__(type(self))
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a LayerParallel stack cannot be pickled (pickle, torch.save of a module, processes that are sent a "
            "model): it holds the layers of one rank alone and a connection to the others. Save its state_dict(), "
            "which has the layers of all ranks, and load_state_dict() it into the model, parallelized or not"
        )

    # --- state dict --------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The parameters of all layers under the keys of the unwrapped layers. Collective: call it on every rank."""
        if args:
            raise TypeError("state_dict takes destination, prefix and keep_vars as keyword arguments only")
        if self.comm.size > 1:
            refuse_peft()
        local = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        of_all_ranks = gather_state_dict(local, self.comm, prefix)
        if destination is None:
            return of_all_ranks
        destination.update(of_all_ranks)
        return destination

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.store.save(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        self._first_weights = []
        # Layers of other ranks are no concern here; their keys must still be those of layers that exist.
        for name in state_dict:
            if name.startswith(prefix):
                index, _, entry = name[len(prefix) :].partition(".")
                if not (index.isdigit() and int(index) < len(self) and self.store.may_have(int(index), entry)):
                    unexpected.append(name)
        self.store.load(state_dict, prefix, missing, errors)
