"""Where a new run's weights come from, if they are not drawn: those of a run before it, as in fine-tuning."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoint import Checkpoint, check_shapes, model_tensors, open_checkpoint
from ..comm.collectively import collectively
from ..comm.communicator import Comm
from ..errors import CheckpointError, ConfigError
from ..parallel.clip import stacks_of
from .config import TrainConfig, from_saved
from .tasks import Task

_SIZES = "dim", "ffn", "sequence", "patch"


def start_from(path: str, model: nn.Module, config: TrainConfig, task: Task, comm: Comm) -> str:
    """Takes the weights of another run, as far as it has them; the rest, such as a head, stays as drawn. Collective.

    Nothing is changed on any rank unless everything could be read on all of them.

    Args:
        path: a run directory or a checkpoint.
        model: wrapped; each rank reads what it holds.
        config, task: of the new run.
        comm: the ranks.

    Returns:
        How many tensors came from where, and which start anew, in one line.

    Raises:
        UserError: on all ranks; no checkpoint, other tokens or classes, heads or step sizes, and what
            :func:`load_weights` raises.
    """
    opened: list[Checkpoint] = []

    def check() -> None:
        opened.append(open_checkpoint(path))
        check_identity(opened[0], task, "weights are of use for the same tokens and classes alone")
        _check_network(opened[0], config)

    collectively(comm, check)
    (checkpoint,) = opened
    filled, left = load_weights(checkpoint, model, hint=_other_sizes(checkpoint, config), comm=comm)
    return f"{len(filled)} tensors from {checkpoint.path}; {', '.join(left) or 'none'} start anew"


def load_weights(
    checkpoint: Checkpoint, model: nn.Module, *, hint: str = "", comm: Comm | None = None
) -> tuple[list[str], list[str]]:
    """Fills what a checkpoint holds of a model, all layers of its stacks at least; the rest stays as it is. Collective.

    Args:
        checkpoint: of any model, such as one with another head.
        model: wrapped or not.
        hint: ends the message about a tensor of another shape.
        comm: the ranks.

    Returns:
        Names of the tensors filled and of those left, over all ranks; stacks' layers by the names of unwrapped ones.

    Raises:
        CheckpointError: on all ranks; no layers or another number of them, a layer without one of its tensors, a tensor
            of another shape, a missing or damaged file.
    """
    comm = Comm.of(comm)
    targets = model_tensors(model)
    stacks = {f"model.{name}.": len(stack) for name, stack in stacks_of(model)}
    values: dict[str, torch.Tensor] = {}

    def read() -> list[str]:
        for prefix, layers in stacks.items():
            _check_layers(checkpoint, prefix, layers)
        values.update(checkpoint.read(n for n in targets if n in checkpoint.tensors or n.startswith(tuple(stacks))))
        check_shapes(checkpoint, values, targets, hint)
        return list(targets)

    names = dict.fromkeys(name for held in collectively(comm, read) for name in held)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    parts = ([n for n in names if (n in checkpoint.tensors) == there] for there in (True, False))
    filled, left = ([n.removeprefix("model.") for n in part] for part in parts)
    return filled, left


def check_identity(checkpoint: Checkpoint, task: Task, remedy: str) -> None:
    """Raises a ConfigError if a checkpoint's vocabulary, or the like, is not the task's."""
    saved = checkpoint.info.get("task", {})
    for name, value in task.identity().items():
        if value != saved.get(name, value):
            raise ConfigError(f"{task.name}: {name} is {value}, that of {checkpoint.path} is {saved[name]}; {remedy}")


def _check_layers(checkpoint: Checkpoint, prefix: str, layers: int) -> None:
    held = {n.removeprefix(prefix).partition(".")[0] for n in checkpoint.tensors if n.startswith(prefix)}
    count = sum(n.isdigit() for n in held)
    if not count:
        raise CheckpointError(f"{checkpoint.path}: holds no layer of the model ({prefix.removeprefix('model.')}0, ...)")
    if count != layers:
        raise CheckpointError(f"{checkpoint.path}: holds {count} layers, the model has {layers}; give --layers {count}")


def _check_network(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Whether the layers compute what they did, as far as shapes do not tell."""
    saved = _saved_config(checkpoint)
    if saved is None or saved.model.layers != config.model.layers:
        return
    if saved.model.heads != config.model.heads:
        raise ConfigError(f"heads = {config.model.heads}: must be {saved.model.heads}, as in {checkpoint.path}")
    if _step_sizes(saved) != _step_sizes(config):
        keys = "step_size", "open_layers", "close_layers"
        now, then = (", ".join(f"{k} = {getattr(c.solver, k)}" for k in keys) for c in (config, saved))
        raise ConfigError(f"{now}: must be {then}, as in {checkpoint.path}")


def _step_sizes(config: TrainConfig) -> list[float]:
    """h of each layer."""
    solver = config.solver
    middle = config.model.layers - solver.open_layers - solver.close_layers
    h = solver.step_size or 1 / middle
    return [1] * solver.open_layers + [h] * middle + [1] * solver.close_layers


def _other_sizes(checkpoint: Checkpoint, config: TrainConfig) -> str:
    saved = _saved_config(checkpoint)
    if saved is None:
        return ""
    now, then = config.flat(), saved.flat()
    return "".join(f"; {k} is {then[k]} there and {now[k]} here" for k in _SIZES if now[k] != then[k])


def _saved_config(checkpoint: Checkpoint) -> TrainConfig | None:
    """The configuration in a checkpoint, if ``mlpint train`` has written it."""
    saved = checkpoint.info.get("config")
    return None if saved is None else TrainConfig.of(from_saved(saved))
