"""Models of the transformers library that no rank has the memory for: each rank makes its own layers and the edges."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..comm.communicator import Comm
from ..errors import UserError
from ..mgrit.layout import Layout
from ..mgrit.options import MGRIT
from ..nn.random_keys import draw_key, key
from .find_stacks import find_stacks
from .position_bias import BIAS_TABLE, hands_on_a_bias

_EVERYWHERE = {"": "meta"}


def build(
    kind: Any,
    source: Any,
    options: MGRIT | None = None,
    *,
    comm: Comm,
    stack: str | None,
    load: Mapping[str, Any],
    open_layers: int = 0,
    close_layers: int = 0,
    layout: str = "block",
    **others: Any,
) -> nn.Module:
    """A model whose layers of other ranks are on torch's meta device, without memory. Collective.

    transformers places each part of a model by a device map, draws what is not read, and reads of safetensors files
    what is placed: here the layers of other ranks are placed nowhere.

    Args:
        kind: a model class, or one of the ``Auto`` classes.
        source: a configuration, or what ``from_pretrained`` takes.
        load: further arguments of ``from_pretrained``.
        others: as the arguments before them, of :class:`LayerParallel`; of no concern here.

    Raises:
        TypeError: no class of the transformers library.
        UserError: on all ranks; files that lack layers.
    """
    transformers = _transformers(kind)
    read = isinstance(source, str | os.PathLike)
    config = source
    if read:
        config = transformers.AutoConfig.from_pretrained(source, **{k: v for k, v in load.items() if k in _OF_CONFIG})
    elif load:
        raise ValueError("load is for what from_pretrained takes, and a configuration has no weights to be read")
    if hasattr(kind, "from_config"):  # an Auto class
        with torch.device("meta"):
            kind = type(kind.from_config(config))
    outline = _made(kind, None, _EVERYWHERE, config=config, state_dict={})[0]
    paths = find_stacks(outline, stack)
    places = {"": "cpu"}
    for path in paths:
        dealt = Layout.deal(
            layout, len(outline.get_submodule(path)), comm.size, options or MGRIT(), open_layers, close_layers
        )
        places |= {f"{path}.{n}": "meta" for n in range(len(dealt)) if dealt.rank_of(n) != comm.rank}
        if hands_on_a_bias(next(outline.get_submodule(path).children())):
            places[".".join((path, "0", *BIAS_TABLE))] = "cpu"
    if read:
        model, report = _made(kind, source, places, **load)
        _check_report(report, paths, source, comm)
        return model
    seed = int(comm.world.broadcast(torch.tensor([draw_key()], device="cpu")))
    with torch.random.fork_rng([]):  # what is drawn here depends on the number of ranks
        model, _ = _made(kind, None, places, config=config, state_dict={})
        _draw(model, paths, seed)
    return model.train()


_OF_CONFIG = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def _transformers(kind: type) -> Any:
    try:
        import accelerate  # noqa: F401 (what transformers places parts of a model with)
        import transformers
    except ImportError as error:
        raise ImportError(f'{error}: pip install "mlpint[hf]" for models of the transformers library') from None
    if not issubclass(kind, transformers.PreTrainedModel) and not hasattr(kind, "from_config"):
        raise TypeError(
            f"{kind.__name__} is no model class of the transformers library: make the model with a "
            "mlpint.LayerFactory in the place of its list of layers"
        )
    return transformers


def _made(kind: Any, source: Any, places: Mapping[str, str], **more: Any) -> tuple[Any, dict[str, Any]]:
    """What ``from_pretrained`` makes, without the hooks by which it would fetch parts that are placed elsewhere."""
    from transformers import modeling_utils
    from transformers.utils import logging

    name = "accelerate_dispatch" if hasattr(modeling_utils, "accelerate_dispatch") else "dispatch_model"
    dispatch, verbosity = getattr(modeling_utils, name), logging.get_verbosity()
    if source is None:
        logging.set_verbosity_error()  # it says of every weight that it is drawn
    setattr(modeling_utils, name, lambda *args, **kwargs: None)
    try:
        return kind.from_pretrained(source, device_map=dict(places), output_loading_info=True, **more)
    finally:
        setattr(modeling_utils, name, dispatch)
        logging.set_verbosity(verbosity)


def _check_report(report: Mapping[str, Any], paths: list[str], source: Any, comm: Comm) -> None:
    inside = tuple(f"{path}." for path in paths)
    missing = sorted(name for name in report["missing_keys"] if name.startswith(inside))
    missing += sorted(str(entry[0]) for entry in report.get("mismatched_keys", ()) if str(entry[0]).startswith(inside))
    messages = comm.world.gather("\n".join(missing[:3]).encode())
    rank = next((rank for rank, message in enumerate(messages) if message), None)
    if rank is not None:
        names = ", ".join(messages[rank].decode().split("\n"))
        raise UserError(f"{Path(source)}: lacks weights of layers, or has them in other shapes: {names} (rank {rank})")


def _draw(model: Any, paths: list[str], seed: int) -> None:
    """Draws all weights anew, each layer's under a seed of its own: the same for any number of ranks."""
    layers = [(i, n, layer) for i, path in enumerate(paths) for n, layer in enumerate(model.get_submodule(path))]
    inside = {layer for _, _, layer in layers}
    with torch.no_grad():
        torch.manual_seed(key(seed, 0, 0, 0))
        _initialise(model, model._init_weights, inside)
        for i, n, layer in layers:
            if not any(p.is_meta for p in layer.parameters()):
                torch.manual_seed(key(seed, 1 + i, 0, n))
                _initialise(layer, model._init_weights, ())
    model.tie_weights()


def _initialise(module: Any, draw: Callable[[nn.Module], None], excluded: Collection[nn.Module]) -> None:
    """As transformers does it: parts before wholes, each by the innermost model that it is a part of."""
    import transformers

    for child in module.children():
        if child not in excluded:
            inner = child._init_weights if isinstance(child, transformers.PreTrainedModel) else draw
            _initialise(child, inner, excluded)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if hasattr(tensor, "_is_hf_initialized"):  # what has been drawn once is passed over
            del tensor._is_hf_initialized
    draw(module)
