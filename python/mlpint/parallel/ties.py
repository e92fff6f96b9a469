"""Parameters of a stack's layers that the model uses outside the stack as well."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

from torch import nn


def tied_outside(stack: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names of own parameters of the stack that modules around it hold too, with the class of such a module.

    A module does not know what it is a part of: the garbage collector is asked, which takes some milliseconds. What
    stacks share is no concern here.

    Args:
        stack: the stack.
        kind: the class of stacks.
    """
    ancestors = ancestors_of(stack)
    own = {p: name for name, p in stack.named_parameters()}
    tied: dict[str, None] = {}
    for ancestor in ancestors:
        inside = {id(m) for other in ancestor.modules() if isinstance(other, kind) for m in other.modules()}
        for module in ancestor.modules():
            if id(module) not in inside:
                for name, parameter in module._parameters.items():
                    if parameter is not None and parameter in own:
                        tied[f"{own[parameter]} (also {name} of a {type(module).__name__})"] = None
    return list(tied)


def ancestors_of(stack: nn.Module) -> list[nn.Module]:
    """The modules of this process that a module is a part of."""
    # gc.get_objects is the quicker one, but takes hold of tuples that other threads are making, which then fail in
    # these (bpo-15108).
    parents_of = _parents_among_all() if threading.active_count() == 1 else _parents_that_refer
    ancestors: dict[nn.Module, None] = {}
    pending = [stack]
    while pending:
        for parent in parents_of(pending.pop()):
            if parent not in ancestors:
                ancestors[parent] = None
                pending.append(parent)
    return list(ancestors)


def _parents_among_all() -> Callable[[nn.Module], list[nn.Module]]:
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in m.__dict__]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
    return lambda module: parents.get(id(module), [])


def _parents_that_refer(module: nn.Module) -> list[nn.Module]:
    parents = []
    for children in gc.get_referrers(module):
        if type(children) is dict:
            for owner in gc.get_referrers(children):
                # The attributes of a module may be a dictionary of their own, or a part of it.
                for holder in gc.get_referrers(owner) if type(owner) is dict else [owner]:
                    if issubclass(type(holder), nn.Module) and holder.__dict__.get("_modules") is children:
                        parents.append(holder)
    return parents
