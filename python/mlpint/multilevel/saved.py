"""What a training needs to go on from the middle of a cycle, as numbers and named tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .copies import Key
from .stacks import ParallelRunner
from .state import ParameterState

if TYPE_CHECKING:
    from .multilevel import Multilevel

Tensors = dict[str, torch.Tensor]


def state_dict(m: Multilevel) -> dict[str, Any]:
    """See :meth:`Multilevel.state_dict`."""
    info = {
        "settings": dataclasses.asdict(m.settings),
        "steps_done": m.steps_done,
        "decisions": list(m._decisions),
        "rule": dataclasses.asdict(m._rule),
        "flops": m.flops.as_dict(),
        "open": list(m._copies),
        "ahead": dict(getattr(m._runner, "ahead", {})),
        "coherence": {name: term.count for name, term in m._coherences.items()},
    }
    return {"info": info, "tensors": dict(_tensors(m))}


def _tensors(m: Multilevel) -> Iterator[tuple[str, torch.Tensor]]:
    for network, copies in m._copies.items():
        for (n, name), value in copies.weights():
            yield f"weights/{network}/{n}/{name}", value
        yield from _state_tensors(f"state/{network}", copies.states())
    for network in m._kept.keys() - m._copies.keys():  # what an open network had kept, it has taken up
        states = m._kept[network]
        yield from _state_tensors(f"kept/{network}", states)
    for name, value in m._runner.learnt() if isinstance(m._runner, ParallelRunner) else ():
        yield f"learnt/{name}", value
    for network, term in m._coherences.items():
        for kind, values in (("average", term.average), ("parent", term.parent)):
            for p, value in values.items():
                place, name = m._names[p]
                yield f"{kind}/{network}/{place}/{name}", value


def _state_tensors(prefix: str, states: Mapping[Key, ParameterState]) -> Iterator[tuple[str, torch.Tensor]]:
    for (n, name), state in states.items():
        for key, value in state.items():
            if value is not None:
                yield f"{prefix}/{n}/{name}/{key}", torch.as_tensor(value)


def is_wanted(m: Multilevel, name: str) -> bool:
    """See :meth:`Multilevel.wants`."""
    kind, _, place = (*name.split("/"), "", "")[:3]
    return kind == "learnt" or place == "shared" or place.isdigit() and int(place) in m._runner.local_indices


def load_state_dict(m: Multilevel, saved: Mapping[str, Any]) -> None:
    """See :meth:`Multilevel.load_state_dict`."""
    info, tensors = saved["info"], saved["tensors"]
    for name, now in dataclasses.asdict(m.settings).items():
        then = info["settings"][name]
        if (list(now) if isinstance(now, tuple) else now) != (list(then) if isinstance(then, tuple) else then):
            raise ValueError(f"{name} = {now!r}: must be {then!r}, as it was when the state was saved")
    m.steps_done, m._decisions = info["steps_done"], list(info["decisions"])
    m._rule = type(m._rule)(**{**info["rule"], "points": [tuple(point) for point in info["rule"]["points"]]})
    m.flops.load(info["flops"])
    if hasattr(m._runner, "ahead"):
        m._runner.ahead = {key: tuple(value) for key, value in info["ahead"].items()}
    weights: dict[str, dict[Key, torch.Tensor]] = {}
    states: dict[str, dict[str, dict[Key, ParameterState]]] = {"state": {}, "kept": {}}
    named = {names: p for p, names in m._names.items()}
    terms: list[tuple[str, str, torch.nn.Parameter, torch.Tensor]] = []
    learnt = {path.removeprefix("learnt/"): t for path, t in tensors.items() if path.startswith("learnt/")}
    if isinstance(m._runner, ParallelRunner):
        m._runner.load_learnt(m.networks, learnt)
    for path, value in tensors.items():
        if path.startswith("learnt/"):
            continue
        kind, network, place, name, *key = path.split("/")
        if kind == "weights":
            weights.setdefault(network, {})[int(place), name] = value
        elif kind in states:
            states[kind].setdefault(network, {}).setdefault((int(place), name), {})[key[0]] = value
        elif (place, name) in named:
            terms.append((kind, network, named[place, name], value))
    m._kept = {name: states["kept"].get(name, {}) for name in m.networks}
    m._load_copies({name: (weights.get(name, {}), states["state"].get(name, {})) for name in info["open"]})
    for name, term in m._coherences.items():
        term.count, term.average, term.parent = info["coherence"][name], {}, {}
    for kind, network, p, value in terms:
        getattr(m._coherences[network], kind)[p] = value.to(p)
