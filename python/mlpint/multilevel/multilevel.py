"""The schedule of multilevel training over a model's blocks and the user's own optimiser."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from ..errors import DataError
from ..flops import Blocks, FlopMeter
from . import saved
from .blocks import check_blocks, runner_of
from .copies import Copies
from .hierarchy import Network, hierarchy
from .learning_rate import scaled_learning_rate
from .options import CASCADE, GROW, Cycles, MultilevelOptions, by_level
from .phase import Phase
from .schedule import Close, Schedule, Step
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

    The defaults are the paper's way; :meth:`cascade` and :meth:`grow` are others, which saved more in this project's
    experiments.

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
            too.
        single: only the first coarse network.
        state: what coarse networks do with the optimiser's state for their blocks. ``"restrict"``: start from the fine
            network's, which is averaged with theirs afterwards (:mod:`mlpint.multilevel.optimizer_state`);
            ``"carry"``: there is only one, which all go on with.
        coarse_lr: factor of the learning rate in coarse steps.
        clock: what ``phase.clock`` counts, for a schedule of the learning rate: fine steps (``"shared"``), or all steps
            by the layers they run, in units of fine ones (``"work"``).
        data: ``"fresh"``, or ``"same"``: the coarse networks of one cycle are meant to see the same batches, by
            ``phase.batch_index``.
        window: cycles that ``cycles="auto"`` looks at together.

    Attributes:
        networks: by name.
        options: the :class:`mlpint.multilevel.options.MultilevelOptions`.
        flops: the :class:`mlpint.flops.FlopMeter` of all phases so far.
        steps_done: optimiser steps so far, on all levels.

    Raises:
        ValueError: an option out of range; a number of blocks that cannot be split evenly; blocks that differ, or that
            share parameters; parameters that the optimiser does not own.
    """

    def __init__(
        self,
        blocks: Blocks,
        optimizer: torch.optim.Optimizer,
        *,
        model: nn.Module | None = None,
        delta: float = 0.25,
        coarse_steps: int | Sequence[int] = 100,
        cycles: Cycles | Sequence[Cycles] = 35,
        networks: int = 2,
        levels: int = 2,
        order: Literal["AB", "BA", "alternating"] = "AB",
        step_size: Literal["ode", "unit"] = "ode",
        neighbours: Literal["none", "average"] = "none",
        single: bool = False,
        state: Literal["restrict", "carry"] = "restrict",
        coarse_lr: float = 1.0,
        clock: Literal["shared", "work"] = "shared",
        data: Literal["fresh", "same"] = "fresh",
        window: int = 5,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.options = MultilevelOptions(
            delta=delta,
            coarse_steps=by_level("coarse_steps", coarse_steps, levels, least=1),
            cycles=by_level("cycles", cycles, levels, least=0, deeper=1),
            networks=networks,
            levels=levels,
            order=order,
            step_size=step_size,
            neighbours=neighbours,
            single=single,
            state=state,
            coarse_lr=coarse_lr,
            clock=clock,
            data=data,
            window=window,
        )
        self._runner = runner_of(blocks)
        layers = [n for n in range(self._runner.count) if n not in self._runner.common_layers]
        self._fine = hierarchy(layers, networks, levels, step_size == "ode", single)
        self.networks: dict[str, Network] = {network.name: network for network in self._fine.walk()}
        self._parents = {child.name: network for network in self._fine.walk() for child in network.children}
        check_blocks(blocks, self._runner, optimizer)
        self._runner.check(self.networks, self.options)
        self.flops = FlopMeter(blocks, model)
        self.steps_done = 0
        self._copies: dict[str, Copies] = {}  # of the networks in training
        self._rule = StoppingRule(window)
        self._decisions: list[bool] = []  # whether a cycle follows each fine step, where cycles = "auto"
        self._schedule: Schedule | None = None
        self._events: Iterator[Step | Close] = iter(())
        self._next: Step | None = None
        self._closed: list[Network] = []  # networks whose training ended with the last step
        self._inside: Phase | None = None

    @classmethod
    def cascade(
        cls,
        blocks: Blocks,
        optimizer: torch.optim.Optimizer,
        *,
        coarse_steps: int | Sequence[int] = 100,
        **options: Any,
    ) -> Multilevel:
        """Trains one coarse network once, whose blocks then take their own and their neighbours' places.

        The preset ``delta=1, neighbours="average", single=True, cycles=1``: after the first fine step network A takes
        ``coarse_steps`` steps, x + 2 F(x); the fine network goes on with each of its blocks twice, x + F(x).

        Args:
            blocks, optimizer: as for the class.

        Keyword args:
            coarse_steps: of network A, which take half a fine step's FLOPs each. Half to four fifths of all FLOPs were
                good.
            options: the class's keyword arguments; those of the preset can be given other values.
        """
        return cls(blocks, optimizer, coarse_steps=coarse_steps, **(CASCADE | options))

    @classmethod
    def grow(
        cls,
        blocks: Blocks,
        optimizer: torch.optim.Optimizer,
        *,
        layers: int = 1,
        coarse_steps: int | Sequence[int] = 100,
        **options: Any,
    ) -> Multilevel:
        """Trains a network of one block, or few, which then becomes the whole one, all blocks copies of these.

        Progressive training (arXiv 2511.04981; stacking all at once, arXiv 2405.15319), where the deep network is only
        trained at the end: a schedule of the learning rate that stays high until then (WSD), by ``phase.clock``, fits
        best. The preset :meth:`cascade` with as many ``networks`` as leave so few blocks, ``step_size="unit"`` and
        ``clock="work"``.

        Args:
            blocks, optimizer: as for the class.

        Keyword args:
            layers: blocks to begin with, beside those that every network has; a divisor of the number of the others.
            coarse_steps: of the small network. A third of all FLOPs was good, which are many steps.
            options: the class's keyword arguments; those of the preset can be given other values.

        Raises:
            ValueError: as the class does; so many layers cannot become the whole network.
        """
        runner = runner_of(blocks)
        count = runner.count - len(runner.common_layers)
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1 or count % layers or layers == count:
            raise ValueError(f"layers = {layers!r}: must be a divisor of the {count} blocks to be trained, and fewer")
        return cls(blocks, optimizer, coarse_steps=coarse_steps, **(GROW | {"networks": count // layers} | options))

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
        schedule = self._schedule_of(total_steps)
        if batches is not None and not self.options.adaptive and schedule.batches() > batches:
            raise ValueError(
                f"the schedule takes {schedule.batches()} batches ({', '.join(map(str, schedule.steps_by_level()))} "
                f"steps on levels 0 to {self.options.levels - 1}), the data has {batches}: lower total_steps, cycles "
                "or coarse_steps, or go through the data several times"
            )
        return self._phases(schedule)

    def total_steps(self, total_steps: int) -> int:
        """Optimiser steps of a whole schedule; with ``cycles="auto"`` those done and the fine ones that are left."""
        if self.options.adaptive:
            return self.steps_done + total_steps - len(self._decisions)
        return sum(self._schedule_of(total_steps).steps_by_level())

    def _schedule_of(self, total_steps: int) -> Schedule:
        return Schedule(self._fine, self.options, total_steps, lambda fine_step: self._decisions[fine_step])

    def _phases(self, schedule: Schedule) -> Iterator[Phase]:
        self._schedule, self._events = schedule, iter(schedule)
        for _ in range(self.steps_done + 1):
            self._closed = self._advance()
        clock_steps = schedule.work() if self.options.clock == "work" else schedule.total
        while self._next is not None:
            step = self._next
            clock = step.work if self.options.clock == "work" else step.fine_step
            phase = Phase(step, clock, clock_steps, self._running)
            yield phase
            if self._schedule is not schedule:
                raise RuntimeError("another schedule of this Multilevel was begun: only the latest one goes on")
            if not phase.entered:
                raise RuntimeError(f"{phase} was not entered: say `with phase:` around each step")

    def _advance(self) -> list[Network]:
        """Goes on to the next step; returns the networks whose training ends before it."""
        closed: list[Network] = []
        for event in self._events:
            if isinstance(event, Step):
                self._next = event
                return closed
            closed.append(event.network)
        self._next = None
        return closed

    def _step_taken(self, phase: Phase) -> None:
        if self.options.adaptive and phase.fine:
            if phase.step_loss is None:
                raise RuntimeError("cycles = 'auto' goes by the loss of fine steps: say phase.loss(loss) in each")
            loss = float(phase.step_loss)
            follows = math.isfinite(loss) and self._rule.another(self.flops.blocks, loss)
            self._decisions.append(self._runner.agreed(follows))
        self.steps_done += 1
        self._closed = self._advance()

    # --- a phase -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self, phase: Phase) -> Iterator[None]:
        """Runs the phase's network inside it; the schedule goes on only if nothing is raised there."""
        if self._inside is not None:
            raise RuntimeError(f"{phase} inside {self._inside}: leave the one before the other")
        if phase.step is not self._next:
            raise RuntimeError(f"{phase} is not the next step of the schedule: enter each phase once, as it comes")
        step, self._closed = phase.step, []
        with ExitStack() as stack:  # which leaves the fine network in place, whatever goes wrong half way
            for network in step.path:
                stack.enter_context(self._in_place(network))
            if step.path:
                self._clear_gradients_outside(step.network)
                self._runner.enter(step.network)
                stack.callback(self._runner.exit)
                stack.enter_context(scaled_learning_rate(self.optimizer, self.options.coarse_lr))
            layers = len(step.network.layers) + len(self._runner.common_layers)
            stack.enter_context(self.flops.step(phase.name, layers))
            self._inside = phase
            try:
                yield
            except StopIteration as error:
                raise DataError(
                    f"the data ended in optimiser step {self.steps_done + 1}, phase {phase.name!r} of fine step "
                    f"{phase.fine_step + 1}: the schedule is longer than the data; lower total_steps, cycles or "
                    "coarse_steps, or go through the data several times"
                ) from error
            finally:
                self._inside = None
            self._step_taken(phase)

    @contextmanager
    def _in_place(self, network: Network) -> Iterator[None]:
        """A coarse network's weights stand in its parent's place inside, and are prolonged where its training ends."""
        if network.name not in self._copies:
            self._copies[network.name] = self._make_copies(network)
        copies = self._copies[network.name]
        copies.swap()
        try:
            yield
        finally:
            copies.swap()
        if network in self._closed:
            copies.prolong()
            del self._copies[network.name]

    def _make_copies(self, network: Network) -> Copies:
        return self._runner.copies(network, self._parents[network.name], self.optimizer, self.options)

    def _clear_gradients_outside(self, network: Network) -> None:
        """No gradient at all for layers outside the network: with a zero, momentum and weight decay would move them."""
        for n in self._runner.parameters.keys() - network.layers - self._runner.common_layers:
            for p in self._runner.parameters[n].values():
                p.grad = None

    # --- to go on from a checkpoint ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What model and optimiser do not have: ``"info"``, which JSON can hold, and ``"tensors"`` by name.

        Between phases, at any place in a cycle. Of the layers of a LayerParallel stack each rank has its own; the names
        are the same for any number of ranks.
        """
        if self._inside is not None:
            raise RuntimeError(f"state_dict inside {self._inside}: take it between phases")
        info = {
            "settings": dataclasses.asdict(self.options),
            "steps_done": self.steps_done,
            "decisions": list(self._decisions),
            "rule": dataclasses.asdict(self._rule),
            "flops": self.flops.as_dict(),
            "open": list(self._copies),
            "ahead": dict(self._runner.ahead),
        }
        tensors = {f"learnt/{name}": tensor for name, tensor in self._runner.learnt()}
        for name, copies in self._copies.items():
            tensors.update(saved.copies_tensors(name, copies))
        return {"info": info, "tensors": tensors}

    def wants(self, name: str) -> bool:
        """Whether a tensor of a state dict that several ranks have put together is needed on this one."""
        kind, _, place = (*name.split("/"), "", "")[:3]
        return kind == "learnt" or place.isdigit() and int(place) in self._runner.local_indices

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there with the next :meth:`schedule`; model and optimiser are loaded before.

        Raises:
            ValueError: the options are not those it was saved with.
        """
        info, tensors = state["info"], dict(state["tensors"])
        saved.check_options(self.options, info["settings"])
        learnt = {name: tensors.pop(name) for name in list(tensors) if name.startswith("learnt/")}
        in_training = saved.saved_copies(tensors, info["open"])
        self.steps_done, self._decisions = info["steps_done"], list(info["decisions"])
        self._rule = StoppingRule(**{**info["rule"], "points": [tuple(point) for point in info["rule"]["points"]]})
        self.flops.load(info["flops"])
        self._runner.ahead = {key: tuple(value) for key, value in info["ahead"].items()}
        self._runner.load_learnt(self.networks, {name.removeprefix("learnt/"): t for name, t in learnt.items()})
        self._copies = {}
        with ExitStack() as stack:  # each network's copies are in place where those of the next are made
            for name, (weights, states) in in_training.items():
                copies = self._copies[name] = self._make_copies(self.networks[name])
                copies.load(weights, states)
                copies.swap()
                stack.callback(copies.swap)
