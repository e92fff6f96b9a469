"""Parameters of a stack's layers that the model uses outside the stack as well."""

from __future__ import annotations

import gc

from torch import nn


def tied_outside(stack: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names of own parameters of the stack that modules around it hold too, with the class of such a module.

    A module does not know what it is a part of. All modules of the process are looked at, which takes some
    milliseconds, and those kept that the stack is a part of. What stacks share is no concern here.

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
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in m.__dict__]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
    ancestors: dict[nn.Module, None] = {}
    pending = [stack]
    while pending:
        for parent in parents.get(id(pending.pop()), []):
            if parent not in ancestors:
                ancestors[parent] = None
                pending.append(parent)
    return list(ancestors)
