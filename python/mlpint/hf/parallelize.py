"""Finding the block stack of a model and replacing it in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..comm.communicator import Comm
from ..comm.fingerprint import checksum
from ..mgrit.options import MGRIT
from ..nn import BlockStack
from ..parallel.clip import stacks_of
from ..parallel.layer_parallel import LayerParallel
from ..parallel.replicas import sync_replicas
from . import families as huggingface
from .trial import Trial

_LISTS = (nn.ModuleList, nn.Sequential)


def parallelize(
    model: nn.Module,
    options: MGRIT | None = None,
    *,
    comm: Any = None,
    stack: str | None = None,
    check: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Replaces the stack of layers in a model by a :class:`LayerParallel` of them. Collective.

    The stack is the ``nn.ModuleList`` (or ``nn.Sequential``) of modules of one class that is longest and holds the most
    parameters, or a :class:`mlpint.nn.BlockStack`. The model's forward must run through a list in the plain way, ``for
    layer in self.layers: x = layer(x, ...)``, each layer with whatever further arguments; a ``BlockStack`` it calls. It
    then works as before on every rank, and so do ``state_dict`` and ``load_state_dict``. A loop that does more with the
    state than to hand it on is refused, here or in the first call. In the configurations of models of the transformers
    library ``use_cache`` is turned off. Everything outside the stack, and the state of torch's random number
    generators, becomes that of rank 0; so do the layers where they differ.

    Of an encoder-decoder model of that library both stacks are replaced, each by a ``LayerParallel`` of its own that
    takes all ranks: the decoder's gets the encoder's output as an argument. One time line for the state (X, Y), as in
    arXiv 2601.09026, eq. (2)-(3), would do the same work, but run the encoder again for every generated token.

    Call it before the optimiser is made, which must not hold on to the layers of other ranks.

    Args:
        model: the same on every rank; changed in place.
        options: how the depth is solved.

    Keyword args:
        comm: as for :class:`LayerParallel`.
        stack: name of the one stack to replace, e.g. ``"encoder.layers"``, where it is not found or not the one.
            A model with several stacks takes one call for each.
        check: whether a model of the transformers library runs a small batch as it is and once more with its stacks
            replaced, so that a loop that does more than this function knows of is refused.
        **kwargs: further arguments of :class:`LayerParallel` (open_layers, recompute, ...).

    Returns:
        The model.

    Raises:
        ValueError: no stack was found, or several that may be meant; a parameter that is used both in the stack and
            outside it; a forward that does more between the layers than to hand the state on; what
            :class:`LayerParallel` raises. The model is as it was.
    """
    comm = Comm.of(comm)
    if len(set(comm.gather(checksum([model]).encode()))) > 1:
        sync_replicas(model, comm)  # layers of several drawings would make up no model of anybody's
    candidates = _candidates(model)
    paths = _choose(model, candidates) if stack is None else [_named(model, stack, candidates)]
    comm.vote({"stack": ", ".join(paths), "class": type(model).__name__}, "the model")
    trial = Trial(model, comm) if check else None
    replacements: dict[str, nn.Module] = {}
    for path in paths:
        layers: Any = model.get_submodule(path)
        places = [name for name, module in model.named_modules(remove_duplicate=False) if module is layers]
        _check_ties(model, layers, places)
        kind = LayerParallel if isinstance(layers, BlockStack) else huggingface.stack_type(model, path)
        replacement = kind(layers, options, comm=comm, **kwargs)
        replacement.training = layers.training
        replacements |= dict.fromkeys(places, replacement)
    originals = {place: model.get_submodule(place) for place in replacements}
    _put(model, replacements)
    sync_replicas(model, comm)
    if trial is not None:
        try:
            trial.compare()
        except ValueError:
            _put(model, originals)
            raise
    for place in replacements:
        owner = model.get_submodule(place.rpartition(".")[0])
        if isinstance(owner, nn.TransformerEncoder):
            owner.use_nested_tensor = False  # the state has to be an ordinary tensor
    huggingface.prepare(model, paths)
    return model


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for place, module in modules.items():
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


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
            kinds = set() if isinstance(module, BlockStack) else {type(layer) for layer in module}
            if not kinds or len(kinds) == 1 and not _is_elementary(module[0]):
                found[name] = len(module)
    return found


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, BlockStack) or _is_list(module)


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


def _check_ties(model: nn.Module, layers: nn.Module, places: list[str]) -> None:
    inside = {p: name for name, p in layers.named_parameters()}
    prefixes = tuple(f"{place}." for place in places)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in inside and not name.startswith(prefixes):
            raise ValueError(
                f"parameter {name} is also {places[0]}.{inside[parameter]}: used in the stack and outside it, it would "
                "get only a part of its gradient on most ranks; untie it"
            )
