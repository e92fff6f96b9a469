"""The schedule of multilevel training over a model's blocks and the user's own optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..errors import DataError
from ..flops import FlopMeter
from . import saved
from .coherence import Coherence
from .copies import Key, ModuleCopies
from .hierarchy import Network, hierarchy
from .phase import Phase
from .plan import Close, Plan, Step
from .runners import check_blocks, runner_of
from .settings import Settings
from .stack_copies import StackCopies
from .stacks import ParallelRunner
from .state import ParameterState
from .steps import StepHooks
from .stopping import StoppingRule


class Multilevel:
    """Trains a network in alternation with coarse networks made of its own blocks (arXiv 2504.18590).

    The training loop stays the user's, and so does the optimiser::

        multilevel = Multilevel(model.blocks, optimizer, cycles=35, coarse_steps=100)
        for phase in multilevel.schedule(total_steps):
            with phase:
                loss = model(next(batches)); loss.backward(); optimizer.step(); optimizer.zero_grad()

    One phase is one optimiser step. After each of the first ``cycles`` fine steps every coarse network is trained for
    ``coarse_steps`` steps, on copies of its blocks; what lies outside the blocks (embedding, head) is shared by all
    networks. At the end the trained blocks are averaged into the fine ones, theta <- (1 - delta) theta + delta
    theta_coarse (equation 4 there). Between phases the model is always the fine network. A phase whose body raises
    changes no schedule: the loop, if it goes on, gets the same step again.

    Args:
        blocks: the residual blocks, wherever they are in the model: an ``nn.Sequential``, ``nn.ModuleList`` or other
            sequence of modules, a :class:`mlpint.nn.BlockStack`, or a :class:`mlpint.LayerParallel` stack, whose
            coarse networks run on the same ranks, each rank averaging its own blocks, and whose open and close layers
            belong to every network. All blocks have parameters of the same names and shapes.
        optimizer: owns the blocks' trainable parameters. It steps what has a gradient, and so leaves alone the blocks
            that are not in the network that steps.

    Keyword args:
        model: what the blocks are part of, so that :attr:`flops` counts what lies outside them too.
        delta: weight of the coarse blocks in the average, in [0, 1].
        coarse_steps: steps of a coarse network each time; one number, or one for each coarse level.
        cycles: fine steps that are followed by coarse training, at first; or ``"auto"``: as long as coarse training
            lowers the loss by more per FLOP than fine training does, which needs ``phase.loss(loss)`` in the loop. With
            several coarse levels a number for each of them; by default 1 below the first.
        networks: coarse networks c of each network; of every c blocks in a row each has one.
        levels: of the hierarchy. 3 divides the coarse networks in turn (12 -> 6 -> 3 blocks).
        order: ``"AB"``, ``"BA"``, or ``"alternating"`` from one to the other.
        step_size: ``"ode"``: a coarse step is c times as long, x + c F(x); ``"unit"``: x + F(x).
        neighbours: ``"none"``; ``"average"``: trained blocks are averaged, with delta, into the blocks they stand for
            too; ``"correction"``: delta times their change is added to these.
        single: only the first coarse network, for ablation.
        state: what coarse networks do with the optimiser's state for their blocks. ``"restrict"``: start from the fine
            network's, which is averaged with theirs afterwards (:mod:`mlpint.multilevel.state`); ``"separate"``: each
            has its own and goes on with it in the next cycle; ``"reset"``: none, and the learning rate rises over
            ``rewarm`` steps; ``"carry"``: there is only one, which all go on with.
        rewarm: see ``state``.
        coherence: weight of the first-order term of MG/OPT, in [0, 1]; see :mod:`mlpint.multilevel.coherence`.
        coarse_lr: factor of the learning rate in coarse steps.
        clock: what ``phase.clock`` counts, for a schedule of the learning rate: fine steps (``"shared"``), the steps on
            the phase's level (``"own"``), or all steps by the layers they run, in units of fine ones (``"work"``).
        data: ``"fresh"``, or ``"same"``: the coarse networks of one cycle are meant to see the same batches, by
            ``phase.batch_index``.
        window: cycles that ``cycles="auto"`` looks at together.

    Attributes:
        networks: by name.
        flops: the :class:`mlpint.flops.FlopMeter` of all phases so far.
        steps_done: optimiser steps so far, on all levels.

    Raises:
        ValueError: an option out of range; a number of blocks that cannot be split evenly; blocks that differ, or that
            share parameters; parameters that the optimiser does not own.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module] | nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.settings, self.optimizer = Settings(**options), optimizer
        s = self.settings
        self._runner = runner_of(blocks)
        layers = [n for n in range(self._runner.count) if n not in self._runner.kept]
        self._fine = hierarchy(layers, s.networks, s.levels, s.step_size == "ode", s.single)
        self.networks: dict[str, Network] = {network.name: network for network in self._fine.walk()}
        self._parents = {child.name: network for network in self._fine.walk() for child in network.children}
        check_blocks(self._runner, optimizer)
        if isinstance(self._runner, ParallelRunner):
            self._runner.check(self.networks, s)
        self.flops = FlopMeter(blocks, model)
        self._copies: dict[str, ModuleCopies | StackCopies] = {}
        self._kept: dict[str, dict[Key, ParameterState]] = {name: {} for name in self.networks}
        inside = {p: (str(n), name) for n, named in self._runner.parameters.items() for name, p in named.items()}
        self._names = inside | {p: ("shared", str(i)) for i, p in enumerate(self._shared(inside))}
        self._coherences = self._make_coherences() if s.coherence else {}
        self._hooks = StepHooks(optimizer, s, self._coherences)
        self._rule = StoppingRule(s.window)
        self._decisions: list[bool] = []  # of the rule, one a fine step
        self._loss: torch.Tensor | float | None = None
        self._plan: Plan | None = None
        self._events: Iterator[Step | Close] = iter(())
        self._next: Step | None = None
        self._inside: Phase | None = None
        self.steps_done = 0

    # --- the schedule ------------------------------------------------------------------------------------------------

    def schedule(self, total_steps: int, *, batches: int | None = None) -> Iterator[Phase]:
        """The phases of a training, one an optimiser step.

        Args:
            total_steps: fine steps in all, those done before included, by this object or by one whose state it loaded.
            batches: how many there are, if known.

        Raises:
            ValueError: more batches are needed than there are.
        """
        if type(total_steps) is not int or total_steps < 1:
            raise ValueError(f"total_steps = {total_steps!r}: must be an integer of at least 1")
        plan = Plan(self._fine, self.settings, total_steps, self._another)
        if batches is not None and not self.settings.adaptive and plan.batches() > batches:
            raise ValueError(
                f"the schedule takes {plan.batches()} batches ({', '.join(map(str, plan.steps_by_level()))} steps on "
                f"levels 0 to {self.settings.levels - 1}), the data has {batches}: lower total_steps, cycles or "
                "coarse_steps, or go through the data several times"
            )
        return self._phases(plan)

    def total_steps(self, total_steps: int) -> int:
        """Optimiser steps of a whole schedule; with ``cycles="auto"`` those done and the fine ones that are left."""
        if self.settings.adaptive:
            return self.steps_done + total_steps - len(self._decisions)
        return sum(Plan(self._fine, self.settings, total_steps, self._another).steps_by_level())

    def _phases(self, plan: Plan) -> Iterator[Phase]:
        self._plan, self._events = plan, iter(plan)
        self._advance()
        for _ in range(self.steps_done):
            self._advance()
        while self._next is not None:
            phase = self._phase(plan, self._next)
            yield phase
            if self._plan is not plan:
                raise RuntimeError("another schedule of this Multilevel was begun: only the latest one goes on")
            if not phase.entered:
                raise RuntimeError(f"{phase} was not entered: say `with phase:` around each step")

    def _phase(self, plan: Plan, step: Step) -> Phase:
        if self.settings.clock == "shared":
            return Phase(self, step, step.fine_step, plan.total)
        if self.settings.clock == "work":
            return Phase(self, step, step.work, plan.work())
        return Phase(self, step, step.own_step, plan.steps_by_level()[step.network.level])

    def _advance(self) -> list[Network]:
        """Goes on to the next step; the networks whose training ends before it."""
        closed = []
        for event in self._events:
            if isinstance(event, Step):
                self._next = event
                return closed
            closed.append(event.network)
        self._next = None
        return closed

    def _another(self, fine_step: int) -> bool:
        if fine_step == len(self._decisions):
            if self._loss is None:
                raise RuntimeError("cycles = 'auto' goes by the loss of fine steps: say phase.loss(loss) in each")
            decision = self._rule.another(self.flops.blocks, float(self._loss))
            self._decisions.append(self._runner.agreed(decision))
        return self._decisions[fine_step]

    def _shared(self, inside: Mapping[nn.Parameter, object]) -> list[nn.Parameter]:
        """What all networks share: what the optimiser owns outside the blocks that are dealt out."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p not in inside]

    def _make_coherences(self) -> dict[str, Coherence]:
        parameters = self._runner.parameters
        if not parameters and self._runner.count:
            raise ValueError("coherence needs blocks with parameters of their own: pass a stack's to_blocks()")
        shared = [p for p, (place, _) in self._names.items() if place == "shared"]
        terms = {}
        for network in (n for n in self.networks.values() if n.level):
            own = [p for n in network.layers for p in parameters.get(n, {}).values()]
            terms[network.name] = Coherence(self.settings.coherence, network.ratio, own, shared)
        return terms

    # --- a phase -----------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        if self._inside is not None:
            raise RuntimeError(f"{phase} inside {self._inside}: leave the one before the other")
        if phase.plan is not self._next:
            raise RuntimeError(f"{phase} is not the next step of the schedule: enter each phase once, as it comes")
        with ExitStack() as undo:  # whatever goes wrong half way
            for network in phase.plan.path:
                if network.name not in self._copies:
                    self._copies[network.name] = self._make_copies(network)
                self._copies[network.name].swap()
                undo.callback(self._copies[network.name].swap)
            if phase.plan.path:
                self._leave_alone_others(phase.plan.network)
                self._runner.enter(phase.plan.network)
            self._hooks.enter(phase.plan)
            undo.pop_all()
        self._inside = phase
        self._counting = self.flops.step(phase.name, len(phase.layers) + len(self._runner.kept))
        self._counting.__enter__()

    def _make_copies(self, network: Network) -> ModuleCopies | StackCopies:
        kept, parent = self._kept[network.name], self._parents[network.name]
        return self._runner.copies(network, parent, self.optimizer, self.settings, kept)

    def _leave_alone_others(self, network: Network) -> None:
        """No gradient at all for layers outside the network: with a zero, momentum and weight decay would move them."""
        for n in self._runner.parameters.keys() - network.layers - self._runner.kept:
            for p in self._runner.parameters[n].values():
                p.grad = None

    def _exit(self, phase: Phase, error: BaseException | None) -> None:
        self._inside = None
        self._counting.__exit__()
        path = phase.plan.path
        self._hooks.exit()
        if path:
            self._runner.exit()
        closed: list[Network] = []
        if error is None:
            self.steps_done += 1
            self._loss = phase.value
            closed = self._advance()
        for network in reversed(path):
            copies = self._copies[network.name]
            copies.swap()
            if network in closed:
                copies.prolong()
                if self.settings.state == "separate":
                    self._kept[network.name] = copies.states()
                del self._copies[network.name]
        if isinstance(error, StopIteration):
            raise DataError(
                f"the data ended in optimiser step {self.steps_done + 1}, phase {phase.name!r} of fine step "
                f"{phase.fine_step + 1}: the schedule is longer than the data; lower total_steps, cycles or "
                "coarse_steps, or go through the data several times"
            ) from error

    # --- to go on from a checkpoint ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What model and optimiser do not have: ``"info"``, which JSON can hold, and ``"tensors"`` by name.

        Between phases, at any place in a cycle. Of the layers of a LayerParallel stack each rank has its own; the names
        are the same for any number of ranks.
        """
        if self._inside is not None:
            raise RuntimeError(f"state_dict inside {self._inside}: take it between phases")
        return saved.state_dict(self)

    def wants(self, name: str) -> bool:
        """Whether a tensor of a state dict that several ranks have put together is needed on this one."""
        return saved.is_wanted(self, name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there with the next :meth:`schedule`; model and optimiser are loaded before.

        Raises:
            ValueError: the options are not those it was saved with.
        """
        saved.load_state_dict(self, state)

    def _load_copies(self, values: Mapping[str, tuple[dict[Key, torch.Tensor], dict[Key, ParameterState]]]) -> None:
        """Of the networks in training, from the outermost in."""
        self._copies = {}
        for name, (weights, states) in values.items():
            copies = self._copies[name] = self._make_copies(self.networks[name])
            copies.load(weights, states)
            copies.swap()  # is the parent of the next
        for copies in reversed(self._copies.values()):
            copies.swap()
