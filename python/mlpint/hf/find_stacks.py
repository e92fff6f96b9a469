"""Finding the stacks of layers in a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import BlockStack, EncoderDecoder
from ..parallel.clip import stacks_of
from . import families as huggingface

_LISTS = (nn.ModuleList, nn.Sequential)
_STACKED = (BlockStack, EncoderDecoder)


def find_stacks(model: nn.Module, stack: str | None) -> list[str]:
    """The names of the stacks to replace: the one that was named, else the ones that can only be meant.

    Raises:
        ValueError: no stack was found, or several that may be meant.
    """
    candidates = _candidates(model)
    return _choose(model, candidates) if stack is None else [_named(model, stack, candidates)]


def _choose(model: nn.Module, candidates: dict[str, int]) -> list[str]:
    kind = type(model).__name__
    if not candidates:
        done = [name for name, _ in stacks_of(model)]
        raise ValueError(
            f"no stack of layers in {kind}"
            + (f" beside the layer-parallel one at {done[0]!r}" if done else "")
            + ": looked for an mlpint.nn.BlockStack, or an nn.ModuleList or nn.Sequential of at least 2 modules of one "
            'class (torch.nn\'s own elementary ones aside); name it with stack="encoder.layers" or the like'
        )
    parts = [
        {name: n for name, n in candidates.items() if name.startswith(f"{part}.")}
        for part in huggingface.encoder_and_decoder(model)
    ]
    if parts and all(parts) and sum(map(len, parts)) == len(candidates):
        best = [_best(model, part) for part in parts]
    else:
        best = [_best(model, candidates)]
    chosen = [name for name in best if name is not None]
    if len(chosen) < len(best):
        raise ValueError(f"{kind} has several stacks of layers; {_name_one(candidates)}")
    if "" in chosen:
        raise ValueError(
            f"the {kind} is itself the stack and cannot be replaced in itself; use model = LayerParallel(model, ...)"
        )
    return chosen


def _best(model: nn.Module, candidates: dict[str, int]) -> str | None:
    """The longest that is also the largest; None if there is no such, or not just one."""
    size = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in candidates}
    best = max(candidates, key=lambda name: (candidates[name], size[name]))
    others = [name for name in candidates if name != best]
    unclear = any(candidates[name] == candidates[best] or size[name] > size[best] for name in others)
    return None if unclear else best


def _candidates(model: nn.Module) -> dict[str, int]:
    """Stacks of at least two layers of one class that do not lie in one another's layers: lengths by name."""
    inside = {m for _, stack in stacks_of(model) for m in stack.modules()}
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        nested = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if module not in inside and not nested and _is_stack(module) and len(module) >= 2:
            kinds = set() if isinstance(module, _STACKED) else {type(layer) for layer in module}
            if not kinds or len(kinds) == 1 and not _is_elementary(module[0]):
                found[name] = len(module)
    return found


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, _STACKED) or _is_list(module)


def _is_list(module: nn.Module) -> bool:
    """A list of modules without a forward of its own, its members numbered from 0."""
    plain = (nn.ModuleList.forward, nn.Sequential.forward)
    numbered = list(module._modules) == [str(n) for n in range(len(module._modules))]
    return isinstance(module, _LISTS) and type(module).forward in plain and numbered


def _is_elementary(layer: nn.Module) -> bool:
    containers = (*_LISTS, nn.ModuleDict)
    return isinstance(layer, containers) or type(layer).__module__.startswith("torch.nn.") and not [*layer.children()]


def _named(model: nn.Module, stack: str, candidates: dict[str, int]) -> str:
    module: Any
    try:
        module = model.get_submodule(stack)
    except AttributeError:
        module = None
    if not stack or module is None or not _is_stack(module) or not len(module):
        what = "no module" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"stack = {stack!r} is {what} in {type(model).__name__}: must name an nn.ModuleList or nn.Sequential with "
            f"numbered layers, or a BlockStack; {_name_one(candidates)}"
        )
    return stack


def _name_one(candidates: dict[str, int]) -> str:
    if not candidates:
        return "none was found"
    return "name one: " + " or ".join(f'stack="{name}" ({length} layers)' for name, length in candidates.items())
