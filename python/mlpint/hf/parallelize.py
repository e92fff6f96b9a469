"""Finding the block stack of a model and replacing it in place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, overload

from torch import nn

from ..comm.communicator import Comm
from ..comm.fingerprint import checksum
from ..mgrit.options import MGRIT
from ..nn import BlockStack, EncoderDecoder
from ..parallel.layer_parallel import LayerParallel
from ..parallel.replicas import sync_replicas
from . import families as huggingface
from .build import build
from .find_stacks import find_stacks
from .stacked import StackedLoop, as_blocks
from .trial import Trial


@overload
def parallelize(model: nn.Module, options: MGRIT | None = None, **kwargs: Any) -> nn.Module: ...


@overload
def parallelize(model: type, source: Any, options: MGRIT | None = None, **kwargs: Any) -> nn.Module: ...


def parallelize(
    model: Any,
    *args: Any,
    comm: Any = None,
    stack: str | None = None,
    check: bool = True,
    load: Mapping[str, Any] | None = None,
    stacked: bool | Literal["auto"] = False,
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

    A model that no rank has the memory for is made here: ``parallelize(GPT2LMHeadModel, source, options, comm=comm)``.
    Each rank makes what lies outside the stacks and its own layers alone. ``source`` is a configuration, whose weights
    are drawn layer by layer, the same for any number of ranks; or what ``from_pretrained`` takes, a directory or a
    name, of whose safetensors files each rank reads its own part. Models of several ranks are not tried (see check).

    Args:
        model: the same on every rank; changed in place. Or a class of the transformers library, before ``source``.
        options: how the depth is solved.

    Keyword args:
        comm: as for :class:`LayerParallel`.
        stack: name of the one stack to replace, e.g. ``"encoder.layers"``, where it is not found or not the one.
            A model with several stacks takes one call for each.
        check: whether a model of the transformers library runs a small batch as it is and once more with its stacks
            replaced, so that a loop that does more than this function knows of is refused.
        load: with a class and a directory or name: further arguments of ``from_pretrained``, such as ``dtype``.
        stacked: whether the layers of models that :func:`mlpint.nn.from_transformers` knows are evaluated as a
            :class:`mlpint.nn.BlockStack`, those of all intervals of a rank at once, which is faster where batches are
            small. ``True``: or refused; ``"auto"``: where they compute exactly that, and rank 0 warns where not.
            Parameters then have a leading dimension, layers, and names of their own (``layers.stacked.qkv_weight``), by
            which an optimiser's groups have to go; ``state_dict`` keeps the model's. Dropout draws other masks.
        **kwargs: further arguments of :class:`LayerParallel` (open_layers, recompute, ...).

    Returns:
        The model.

    Raises:
        ValueError: no stack was found, or several that may be meant; a parameter that is used both in the stack and
            outside it; a forward that does more between the layers than to hand the state on; what
            :class:`LayerParallel` raises. The model is as it was.
    """
    comm = Comm.of(comm)
    if stacked not in (True, False, "auto"):
        raise ValueError(f'stacked = {stacked!r}: must be True, False or "auto"')
    if isinstance(model, type):
        if not args:
            raise TypeError(f"parallelize({model.__name__}, ...) needs a configuration or what from_pretrained takes")
        source, args = args[0], args[1:]
        model = build(model, source, *args, comm=comm, stack=stack, load=load or {}, **kwargs)
    elif load is not None:
        raise ValueError("load is for a class of the transformers library and what its from_pretrained takes")
    options = args[0] if args else None
    whole = not any(map(int, comm.world.gather(b"1" if _has_parts_elsewhere(model) else b"0")))
    if whole and len(set(comm.world.gather(checksum([model]).encode()))) > 1:
        sync_replicas(model, comm)  # layers of several drawings would make up no model of anybody's
    paths = find_stacks(model, stack)
    comm.vote({"stack": ", ".join(paths), "class": type(model).__name__}, "the model")
    trial = Trial(model, comm, stacked=bool(stacked)) if check and whole else None
    ways = [True, False] if stacked == "auto" else [bool(stacked)]
    reason = ""
    for as_stacks in ways:
        try:
            replacements = _replaced(model, paths, as_stacks, options, comm, trial, kwargs)
            break
        except _NotStackedError as error:
            reason = f"the layers of {type(model).__name__} cannot be stacked: {error}"
            if stacked is True:
                raise ValueError(f"stacked = True: {reason}") from None
    if reason and comm.world.rank == 0:
        warnings.warn(f"{reason}; they are evaluated one by one", stacklevel=2)
    for place in replacements:
        owner = model.get_submodule(place.rpartition(".")[0])
        if isinstance(owner, nn.TransformerEncoder):
            owner.use_nested_tensor = False  # the state has to be an ordinary tensor
    huggingface.prepare(model, paths)
    return model


class _NotStackedError(ValueError):
    """The layers of a stack cannot be blocks; says why."""


def _replaced(
    model: nn.Module,
    paths: list[str],
    as_stacks: bool,
    options: MGRIT | None,
    comm: Comm,
    trial: Trial | None,
    kwargs: dict[str, Any],
) -> dict[str, nn.Module]:
    """What has taken the places of the stacks, by name; after an error the model is as it was."""
    replacements: dict[str, nn.Module] = {}
    for path in paths:
        layers: Any = model.get_submodule(path)
        places = [name for name, module in model.named_modules(remove_duplicate=False) if module is layers]
        _check_ties(model, layers, places)
        replacement = _replacement(model, path, as_stacks, options, comm, kwargs)
        replacement.training = layers.training
        replacements |= dict.fromkeys(places, replacement)
    originals = {place: model.get_submodule(place) for place in replacements}
    _put(model, replacements)
    sync_replicas(model, comm)
    if trial is not None:
        try:
            trial.compare()
        except ValueError as error:
            _put(model, originals)
            raise (_NotStackedError(str(error)) if as_stacks else error) from None
    return replacements


def _replacement(
    model: nn.Module, path: str, as_stacks: bool, options: MGRIT | None, comm: Comm, kwargs: dict[str, Any]
) -> LayerParallel:
    layers: Any = model.get_submodule(path)
    if isinstance(layers, BlockStack | EncoderDecoder):
        return LayerParallel(layers, options, comm=comm, **kwargs)
    kind = huggingface.stack_type(model, path)
    if not as_stacks:
        return kind(layers, options, comm=comm, **kwargs)
    blocks, reason = None, ""
    try:
        blocks = as_blocks(model, path)
    except ValueError as error:
        reason = str(error)
    reasons = [message.decode() for message in comm.world.gather(reason.encode())]
    if any(reasons) or blocks is None:
        raise _NotStackedError(next(filter(None, reasons)))
    return StackedLoop(layers, options, evaluated=blocks, comm=comm, **kwargs)


def _has_parts_elsewhere(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters()) and not all(p.is_meta for p in model.parameters())


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for place, module in modules.items():
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def _check_ties(model: nn.Module, layers: nn.Module, places: list[str]) -> None:
    inside = {p: name for name, p in layers.named_parameters()}
    prefixes = tuple(f"{place}." for place in places)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in inside and not name.startswith(prefixes):
            raise ValueError(
                f"parameter {name} is also {places[0]}.{inside[parameter]}: used in the stack and outside it, it would "
                "get only a part of its gradient on most ranks; untie it"
            )
