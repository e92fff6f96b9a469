"""``mlpint plan``: which way to use so many ranks is fastest for a network, and what to type."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..comm import Comm, init
from ..errors import ConfigError
from ..planning.measuring import kept_bytes, measure
from ..planning.simulation import Costs
from ..planning.ways import Network, Priced, Way, all_ways, price
from ..training.config import KEYS, TrainConfig
from ..training.tasks import make
from .flags import add_flag, flag_values

# Of a layer's forward, for a message with a state: FLOPS / (12 d bandwidth), whatever the batch; so between fast GPUs.
_HOP = 0.2
_SOLVER = ("levels", "cfactor", "forward_iters", "backward_iters", "relaxation", "coarse", "layout", "chain_slices")
_NETWORK = (
    "task",
    "arch",
    "layers",
    "dim",
    "heads",
    "kv_heads",
    "ffn",
    "sequence",
    "batch",
    "open_layers",
    "close_layers",
    "data",
)


def add_flags(parser: Any) -> None:
    """The flags of ``mlpint plan``: the ranks, the network, a setting to be priced among the others, and costs."""
    parser.add_argument("--ranks", default=2, type=int, metavar="N", help="ranks (default 2)")
    costs = parser.add_argument_group("costs", "by default in units of one layer's forward on the whole batch")
    costs.add_argument("--measure", action="store_true", help="measure layer, head and messages on this machine")
    for name, unit in (
        ("layer-ms", "a layer's forward on the whole batch, milliseconds"),
        ("head-ms", "forward and backward of what lies outside the layers, milliseconds"),
        ("hop-us", "latency of a message, microseconds"),
        ("bandwidth-GBps", "between ranks, gigabytes a second"),
        ("memory-GB", "of a rank; what needs more is left out"),
    ):
        costs.add_argument(f"--{name}", type=float, metavar="X", help=unit)
    parser.add_argument(
        "--least-cosine",
        default=0.95,
        type=float,
        metavar="X",
        help="of gradients to exact ones; ways whose gradients are poorer are left out (default .95)",
    )
    parser.add_argument("--rows", default=12, type=int, metavar="N", help="ways to show (default 12)")
    network = parser.add_argument_group("network", "--batch is that of all replicas together")
    for name in _NETWORK:
        add_flag(network, KEYS[name])
    setting = parser.add_argument_group("setting", "where one of these is given, it is priced too, as it is")
    for name in (*_SOLVER, "consistency", "data_parallel"):
        add_flag(setting, KEYS[name])


def run(options: argparse.Namespace) -> None:
    """Prints what each way should cost, the fastest first.

    Raises:
        ConfigError: flags out of range, or a setting that the ranks do not allow.
    """
    values = flag_values(options)
    config = TrainConfig.of({**values, "data_parallel": 1})
    for name in ("ranks", "rows"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} = {getattr(options, name)}: must be an integer of at least 1")
    for name in ("layer_ms", "head_ms", "hop_us", "bandwidth_GBps", "memory_GB"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < float("inf") or name == "bandwidth_GBps" and value == 0:
            raise ConfigError(f"{name} = {value}: must be a positive number")
    comm = init()
    given = [name for name in (*_SOLVER, "consistency", "data_parallel") if name in values]
    asked = _as_asked(options.ranks, config, values.get("data_parallel", 1)) if given else None
    network, costs, unit, bandwidth_time, source = _sizes(options, config, comm)
    if comm.rank:
        return
    rows = _priced(options, network, costs, bandwidth_time, asked)
    _show(options, config, rows, price(Way(), network, costs).time, asked, unit, source)


def _as_asked(ranks: int, config: TrainConfig, replicas: int) -> Way:
    solver, each = config.solver, ranks // replicas
    if ranks % replicas:
        raise ConfigError(f"data_parallel = {replicas}: must divide the {ranks} ranks")
    options, slices = solver.mgrit(), solver.chain_slices or 1
    if options.exact:
        slices = max(slices, solver.serial_microbatches)
    way = Way(replicas, each, options, slices, solver.layout, solver.mu > 0)
    intervals = -(-(config.model.layers - solver.open_layers - solver.close_layers) // options.cfactor)
    if not options.exact and solver.layout == "block" and each > intervals:
        raise ConfigError(
            f"ranks = {ranks}: {each} ranks a replica, and there are {intervals} intervals of cfactor = "
            f"{options.cfactor} layers: {each - intervals} would have nothing to do. Take fewer ranks, a smaller "
            "cfactor or more replicas"
        )
    return way


def network_of(
    config: TrainConfig, place: torch.device
) -> tuple[Network, Any, Callable[[], torch.Tensor], torch.Tensor]:
    """The network, a model with one layer of it, that one's loss on a batch, and the state before the layer."""
    solver, model = config.solver, dataclasses.replace(config.model, layers=1, encoder_layers=0)
    one = dataclasses.replace(config, model=model, solver=dataclasses.replace(solver, open_layers=0, close_layers=0))
    task = make(one, planned=True)
    torch.manual_seed(config.run.seed)
    with place:
        small: Any = task.model()
    batch = tuple(t.to(place) for t in task.train(0))

    def loss() -> torch.Tensor:
        return task.loss(small, batch)

    layer, state, args, kwargs = first_call(small, loss)
    network = Network(
        config.model.layers,
        solver.open_layers,
        solver.close_layers,
        config.data.batch,
        _bytes(layer),
        _bytes(small) - _bytes(layer),
        kept_bytes(layer, state, args, kwargs) // len(state),
    )
    return network, small, loss, state


def _sizes(options: argparse.Namespace, config: TrainConfig, comm: Comm) -> tuple[Network, Costs, str, float, str]:
    """The network, its costs, their unit, the time that a byte takes, and where all that comes from."""
    # On the meta device shapes take no memory, however large.
    network, small, loss, state = network_of(config, torch.device("cpu" if options.measure else "meta"))
    given = (options.layer_ms, options.head_ms, options.hop_us, options.bandwidth_GBps)
    if options.measure:
        if any(value is not None for value in given):
            raise ConfigError("measure: measures what --layer-ms, --head-ms, --hop-us and --bandwidth-GBps give")
        if comm.size > 1:
            torch.set_num_threads(1)
        costs = measure(*first_call(small, loss), loss, comm)
        where = f"measured on {comm.size} rank{'s' if comm.size > 1 else ''}"
        if comm.size == 1:
            where += "; messages as MPI's on one machine (20 us, 5 GB/s): start it on 2 ranks to measure them"
        return network, costs, "ms", costs.transfer / state.nbytes, where
    if options.layer_ms is None:
        if any(value is not None for value in given):
            raise ConfigError("layer_ms: is needed beside --head-ms, --hop-us and --bandwidth-GBps, or --measure")
        source = "counted in forwards of one layer, a message at .2 of one, the head at none; small slices lose nothing"
        return network, Costs(transfer=_HOP), "layers", _HOP / state.nbytes, source
    f, a_byte = options.layer_ms / 1e3, 1 / (options.bandwidth_GBps or 10) / 1e9
    hop = (20.0 if options.hop_us is None else options.hop_us) / 1e6
    costs = Costs(f, f, 2 * f, {}, hop, a_byte * state.nbytes, (options.head_ms or 0.0) / 1e3)
    return network, costs, "ms", a_byte, f"from the numbers given, messages {hop * 1e6:g} us and {1e-9 / a_byte:g} GB/s"


def first_call(model: Any, loss: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor, tuple, dict[str, Any]]:
    """A layer and what the model calls it with."""
    calls: list[Any] = []
    layer = next(iter(model.blocks.children()))
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        loss()
    handle.remove()
    (state, *args), kwargs = calls[0]
    return layer, state, tuple(args), kwargs


def _priced(
    options: argparse.Namespace, network: Network, costs: Costs, bandwidth_time: float, asked: Way | None
) -> list[Priced]:
    """The ways that may be, the fastest first, of each solver setting with its best number of slices."""
    best: dict[tuple, Priced] = {}
    for way in all_ways(network, options.ranks):
        try:
            row = price(way, network, costs, costs.latency, bandwidth_time)
        except ValueError:
            continue
        key = way.replicas, way.options, way.layout, way.consistency
        too_large = options.memory_GB is not None and row.memory > options.memory_GB * 1e9
        if row.cosine is None or row.cosine < options.least_cosine or row.idle or too_large:
            continue
        if key not in best or row.time < best[key].time:
            best[key] = row
    rows = sorted(best.values(), key=lambda row: row.time)
    if asked is not None:
        try:
            rows.insert(0, price(asked, network, costs, costs.latency, bandwidth_time))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return rows


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _show(
    options: argparse.Namespace,
    config: TrainConfig,
    rows: list[Priced],
    serial: float,
    asked: Way | None,
    unit: str,
    source: str,
) -> None:
    scale = 1e3 if unit == "ms" else 1.0
    model = config.model
    print(
        f"{model.layers} layers, dim {model.dim}, batch {config.data.batch}, on {options.ranks} ranks; {source}\n"
        f"a step of one rank takes {scale * serial:.4g} {unit}"
    )
    if not rows:
        print("nothing fits: allow a smaller --least-cosine, more --memory-GB or fewer --ranks")
        return
    print(f"{unit:>9}  speed-up  bubble  GB a rank  cosine  way")
    shown = rows[: options.rows + (asked is not None)]
    for row in shown:
        cosine = "?" if row.cosine is None else f"{row.cosine:.3f}"
        if row.way.options.exact:
            cosine = "exact"
        note = "  <- as given" if row.way is asked else ""
        note += f" ({row.idle} ranks idle)" if row.idle else ""
        print(
            f"{scale * row.time:>9.4g}{serial / row.time:>10.2f}{row.bubble:>8.0%}{row.memory / 1e9:>11.3g}"
            f"{cosine:>8}  {row.way.name}{note}"
        )
    best = min(rows, key=lambda row: row.time)
    print(f"fastest: {best.way.name}. {_verdict(best, rows)}\n  {_command(options, config, best.way)}")


def _verdict(best: Priced, rows: list[Priced]) -> str:
    exact = min((row for row in rows if row.way.options.exact), key=lambda row: row.time, default=None)
    if best.way.options.exact:
        kind = "data parallelism" if best.way.replicas > 1 else "one rank"
        if best.way.ranks > 1:
            kind = "an exact pipeline"
        return f"Layer-parallel training brings nothing here: {kind} is exact and faster"
    if exact is None:
        return "No exact way fits"
    return f"The fastest exact way, {exact.way.name}, takes {exact.time / best.time:.2f} times as long"


def _command(options: argparse.Namespace, config: TrainConfig, way: Way) -> str:
    """What to type: the flags that were given for the network, and those of the way."""
    defaults, flat = TrainConfig().flat(), config.flat()
    flags = [f"--{n.replace('_', '-')} {flat[n]}" for n in _NETWORK if flat[n] != defaults[n] and n != "batch"]
    batch = config.data.batch // way.replicas
    flags += [f"--batch {batch}"] * (batch != defaults["batch"])
    launcher = f"mpirun -n {options.ranks} " if options.ranks > 1 else ""
    return " ".join([f"{launcher}mlpint train", *flags, way.flags])
