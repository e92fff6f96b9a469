"""The configuration of a training run: frozen dataclasses, each key a TOML key and a command-line flag.

Keys are unique over all sections, so a flag needs no section: ``cfactor = 4`` under ``[solver]`` is ``--cfactor 4``.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..errors import ConfigError
from ..layers.consistency import check_operator
from ..mgrit.options import MGRIT
from ..multilevel.options import CASCADE, GROW
from .fields import Section, key, similar
from .loggers import LOGS

_LONGEST = 1 << 20  # bytes of a configuration file
TASKS = ("gpt", "bert", "vit", "tagging", "classification", "translation")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    task: str = key("gpt", "what is trained: " + ", ".join(TASKS), choices=TASKS)
    layers: int = key(32, "transformer layers, buffer layers included", least=1)
    encoder_layers: int = key(0, "translation: those of the layers that are the encoder's; 0: half", least=0)
    dim: int = key(128, "width", least=1)
    arch: str = key(
        "gpt2",
        "gpt: gpt2, or llama (RMSNorm, rotary positions, SwiGLU, grouped queries)",
        choices=("gpt2", "llama"),
    )
    heads: int = key(4, "attention heads", least=1)
    kv_heads: int = key(0, "llama: heads of keys and values, a divisor of heads; 0: as many", least=0)
    ffn: int = key(0, "inner width of the layers' second half; 0: 4 dim, llama: 8 / 3 dim", least=0)
    dropout: float = key(0.0, "dropout probability", least=0, below=1)
    tied: bool = key(True, "one matrix for the token embedding and the output layer")
    vocabulary: int = key(
        0, "vocabulary size; 0: 256 for text, 4096 for its byte pairs, 50257 for .bin, 6000 for translation", least=0
    )
    patch: int = key(2, "vit: side of a patch in pixels", least=1)


@dataclasses.dataclass(frozen=True)
class SolverConfig(Section):
    """The arguments of ``MGRIT``, ``LayerParallel`` and ``ErrorControl``; the defaults of ``mlpint train`` are here."""

    levels: int = key(2, "multigrid levels; 1: exact", most=64)
    cfactor: int = key(4, "layers per interval of the coarse grid")
    forward_iters: int = key(1, "iterations of the forward solve; 0: exact; 2 with multilevel and for translation")
    backward_iters: int = key(1, "iterations of the adjoint solve; 0: exact")
    relaxation: str = key("F", "F or FCF")
    coarse: str = key("injection", "coarse operator; fitted with multilevel and for translation")
    tolerance: float = key(0.0, "stop a solve at this relative residual norm; 0: never look at it")
    open_layers: int = key(2, "layers before the parallel part, computed exactly", least=0)
    close_layers: int = key(2, "layers after the parallel part, computed exactly", least=0)
    step_size: float = key(1.0, "h of x + h F(x) in the parallel layers; 0: 1 / their number", least=0)
    layout: str = key("block", "block or cyclic (for coarse = sum)", choices=("block", "cyclic"))
    serial_microbatches: int = key(1, "slices of a batch that exact sweeps stream through the ranks", least=1)
    chain_slices: int = key(
        1,
        "slices of a batch in coarse sweeps that go from rank to rank; 0: by measurement (runs may differ by rounding)",
        least=0,
    )
    consistency: float = key(
        -1.0,
        "mu of the term that keeps the coarse model true; 0: none; -1: 1 (vit: .1) where injection iterates both ways "
        "at step_size = 1",
        least=-1,
    )
    consistency_start: int = key(0, "steps without that term at first", least=0)
    consistency_warmup: int = key(0, "steps in which mu then rises from 0", least=0)
    consistency_final: float = key(
        1.0, "mu at the last step, as a fraction, to which it goes by half a cosine", least=0, most=1
    )
    stacked: bool = key(True, "keep equal layers' parameters stacked, and evaluate those of all intervals together")
    recompute: bool = key(False, "recompute layers in the backward pass instead of keeping their graphs")
    control: str = key(
        "auto",
        "error control: off, gradient, residual, or auto: gradient where sweeps are not exact",
        choices=("auto", "off", "gradient", "residual"),
    )
    control_target: float = key(
        0.0, "smallest gradient cosine, or largest convergence factor; 0: 0.95, or 1 for residual", least=0
    )
    control_every: int = key(200, "steps between checks of the error", least=1)
    control_start: int = key(-1, "steps before the first check; -1: a tenth of control_every, at most 20", least=-1)
    control_consistency: bool = key(
        False, "error control raises mu before it raises iterations, and lowers it where there is room"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mgrit().exact and self.control in ("gradient", "residual"):
            raise ConfigError(f"control = {self.control!r}: the sweeps are exact; raise forward_iters")
        if -1 < self.consistency < 0:
            raise ConfigError(f"consistency = {self.consistency:g}: must be at least 0, or -1")
        if self.control_consistency and (not self.mu or self.measure is None):
            raise ConfigError(
                "control_consistency needs error control, and a consistency above 0 to begin with: "
                f"control = {self.control!r}, consistency = {self.mu:g}"
            )
        if self.mu:
            try:
                check_operator(self.coarse)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        if self.measure == "gradient" and self.control_target >= 1:
            raise ConfigError(f"control_target = {self.control_target}: must be below 1, a cosine")

    @property
    def measure(self) -> Literal["gradient", "residual"] | None:
        """What error control measures; None where there is none."""
        if self.control == "residual":
            return "residual"
        gradient = self.control == "gradient" or (self.control == "auto" and not self.mgrit().exact)
        return "gradient" if gradient else None

    @property
    def unchecked_steps(self) -> int:
        """Steps before the first check: the coarse model of an untrained network is poor in its first steps alone."""
        return min(self.control_every // 10, 20) if self.control_start < 0 else self.control_start

    @property
    def mu(self) -> float:
        """The weight of the consistency term; where it was not given, see :attr:`mu_by_default`."""
        return self.consistency if self.consistency >= 0 else float(self.mu_by_default)

    @property
    def mu_by_default(self) -> bool:
        """Whether there is a term because nobody said otherwise: left out where no interval has several layers.

        Injection at (1,1), the cheapest setting, diverges without it (docs/experiments.md, sections 6 and 13). Shorter
        steps need no term, and mu 1 costs a tenth of the loss and more with them (section 14).
        """
        both = not self.mgrit().exact and self.forward_iters > 0 and self.backward_iters > 0
        needed = both and self.coarse == "injection" and self.layout == "block" and self.step_size == 1
        return self.consistency < 0 and needed

    def consistency_part(self, step: int, steps: int) -> float:
        """The part of mu in step 0, 1, ..., steps - 1 that its schedule allows."""
        risen = self.consistency_start + self.consistency_warmup
        if step < risen:
            return max(step + 1 - self.consistency_start, 0) / max(self.consistency_warmup, 1)
        progress = min((step - risen) / max(steps - 1 - risen, 1), 1.0)
        return self.consistency_final + (1 - self.consistency_final) * (1 + math.cos(math.pi * progress)) / 2

    def mgrit(self) -> MGRIT:
        """The solver's options."""
        names = {field.name for field in dataclasses.fields(MGRIT)}
        try:
            return MGRIT(**{name: value for name, value in vars(self).items() if name in names})
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("MGRIT.")) from None


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    data: str = key("", "training data: a file or a directory, as the task takes it; empty: what needs no download")
    validation: str = key("", "data to validate on; empty: a tenth of the training data is held out")
    source: str = key("de", "translation: language to translate from, the ending of its files' names")
    target: str = key("en", "translation: language to translate to, the ending of its files' names")
    label: str = key("", "classification: comment or column with the class; empty: s_type of CoNLL-U, else label")
    tokenizer: str = key(
        "bytes", "of text: bytes; bpe, byte pairs learnt from it; or the tokenizer.json in the directory of such a run"
    )
    sequence: int = key(
        64, "tokens per sequence; tagging: words of the longest sentence; classification: tokens of a text", least=1
    )
    batch: int = key(8, "sequences per microbatch", least=1)
    mask: float = key(0.2, "bert: fraction of the tokens to be named", above=0, below=1)
    image_size: int = key(0, "vit: side that images are scaled and cropped to; 0: all must be of one size", least=0)
    augment: int = key(0, "vit: pixels by which training images are shifted at most", least=0)
    accumulate: int = key(1, "microbatches per step", least=1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    optimizer: str = key(
        "adamw",
        "adamw, sgd, or muon for the layers' matrices with adamw for all else",
        choices=("adamw", "sgd", "muon"),
    )
    lr: float = key(1e-3, "highest learning rate", above=0)
    warmup: int = key(20, "steps of linear warm-up", least=0)
    schedule: str = key(
        "cosine",
        "after warm-up: cosine, or wsd, which is constant and falls linearly at the end",
        choices=("cosine", "wsd"),
    )
    decay: float = key(0.2, "wsd: the part of the steps in which the learning rate falls", above=0, most=1)
    final_lr: float = key(0.1, "learning rate at the last step, as a fraction of the highest", least=0, most=1)
    weight_decay: float = key(0.1, "weight decay of matrices", least=0)
    beta2: float = key(0.95, "decay of adamw's average of squared gradients", least=0, below=1)
    momentum: float = key(0.9, "momentum of sgd; muon's is .95", least=0, below=1)
    label_smoothing: float = key(0.0, "translation: part of the probability that all tokens share", least=0, below=1)
    clip: float = key(1.0, "largest gradient norm; 0: no clipping", least=0)


# What Multilevel calls the keys that have names of their own.
_OPTIONS = {
    "coarse_networks": "networks",
    "depths": "levels",
    "coarse_step_size": "step_size",
    "optimizer_state": "state",
}


@dataclasses.dataclass(frozen=True)
class MultilevelConfig(Section):
    """The arguments of ``Multilevel``."""

    multilevel: bool = key(False, "train in alternation with coarse networks, made of every other layer")
    preset: str = key(
        "paper",
        "paper; cascade: train one coarse network once, whose layers then take their own and their neighbours' "
        f"places; stands for {', '.join(f'{name} = {value}' for name, value in CASCADE.items())} where these are not "
        "given; grow: the same from a single layer, with coarse_step_size = unit, clock = work and schedule = wsd",
        choices=("paper", "cascade", "grow"),
    )
    delta: float = key(0.25, "weight of trained coarse layers in their average with the fine ones", least=0, most=1)
    coarse_steps: int = key(100, "steps of a coarse network at a time", least=1)
    cycles: int = key(35, "first steps that coarse training follows; -1: as long as it pays per FLOP", least=-1)
    coarse_networks: int = key(2, "coarse networks; each has every so-many-th layer", least=2)
    depths: int = key(2, "depths in all: 2: 12 and 6 layers; 3: 12, 6 and 3", least=2)
    order: str = key("AB", "of coarse networks: AB, BA or alternating", choices=("AB", "BA", "alternating"))
    coarse_step_size: str = key("ode", "ode: x + 2 F(x) in a network of half the layers; unit: x + F(x)",
                                choices=("ode", "unit"))  # fmt: skip
    neighbours: str = key(
        "none", "prolong to layers that were not trained: none or average", choices=("none", "average")
    )
    single: bool = key(False, "only one coarse network")
    optimizer_state: str = key(
        "restrict",
        "momentum and Adam's averages on the levels: restrict or carry",
        choices=("restrict", "carry"),
    )
    coarse_lr: float = key(1.0, "factor of the learning rate in coarse steps", least=0)
    clock: str = key(
        "shared",
        "the learning rate goes by fine steps (shared) or by layers run so far (work)",
        choices=("shared", "work"),
    )
    same_data: bool = key(False, "the coarse networks of a cycle see the same batches")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles < 0 and self.clock != "shared":
            raise ConfigError(
                f"clock = {self.clock!r}: its length is not known with cycles = -1; give a number of cycles"
            )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``Multilevel``."""
        options = {_OPTIONS.get(name, name): value for name, value in vars(self).items()}
        options["data"] = "same" if options.pop("same_data") else "fresh"
        options["cycles"] = "auto" if self.cycles < 0 else self.cycles
        del options["multilevel"], options["preset"]
        return options


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    steps: int = key(300, "optimiser steps; with multilevel those of the whole network", least=1)
    seed: int = key(0, "seed of the weights, the data order and dropout", least=0, below=2**63)
    dtype: str = key("fp32", "fp32 or bf16 (autocast)", choices=("fp32", "bf16"))
    data_parallel: int = key(
        1, "replicas of the model, each spread over 1/N of the ranks and trained on its own batches", least=1
    )
    device: str = key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    threads: int = key(
        0, "torch threads per rank; 0: one if there are several ranks, else torch's choice", least=0, most=4096
    )
    out: str = key("", "directory for results; empty: runs/NNN, the next free number")
    trace: bool = key(False, "write a trace of three steps of all ranks to trace.json and draw the last of them")
    init_from: str = key("", "run directory or checkpoint whose weights a new run starts from")
    resume: str = key("", "run directory (its latest checkpoint) or checkpoint to go on from")
    checkpoint_every: int = key(0, "steps between checkpoints; the last step always has one", least=0)
    checkpoint_keep: int = key(3, "newest checkpoints to keep; 0: all", least=0)
    eval_every: int = key(50, "steps between validations; 0: at the end only", least=0)
    eval_batches: int = key(8, "batches per validation; 0: all held-out data", least=0)
    log: str = key(
        "jsonl",
        "metrics.jsonl, which is written in any case, alone, or to tensorboard or wandb as well (pip install either)",
        choices=LOGS,
    )
    log_every: int = key(10, "steps between log lines", least=1)
    sample: int = key(200, "gpt: tokens to generate at the end; else any number shows an example; 0: none", least=0)
    beams: int = key(
        4, "translation: beams of the search for the closing translations; val_bleu's has one", least=1, most=1024
    )
    compare: int = key(5, "batches for the closing comparison with the exact sweep; 0: none", least=0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that ``mlpint train`` can be told.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """

    model: ModelConfig = ModelConfig()
    solver: SolverConfig = SolverConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    multilevel: MultilevelConfig = MultilevelConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        model, solver = self.model, self.solver
        if model.dim % model.heads:
            raise ConfigError(f"dim = {model.dim}: must be a multiple of heads = {model.heads}")
        if model.arch != "gpt2" and model.task != "gpt":
            raise ConfigError(f"arch = {model.arch!r}: is for task = 'gpt', not {model.task!r}")
        if model.kv_heads and (model.arch == "gpt2" or model.heads % model.kv_heads):
            raise ConfigError(f"kv_heads = {model.kv_heads}: must divide heads = {model.heads}, with arch = 'llama'")
        if model.arch == "llama" and model.dim // model.heads % 2:
            raise ConfigError(f"arch = 'llama': dim / heads = {model.dim // model.heads}: must be even")
        if solver.open_layers + solver.close_layers >= model.layers:
            raise ConfigError(
                f"open_layers + close_layers = {solver.open_layers + solver.close_layers}: "
                f"must be less than layers = {model.layers}"
            )
        if solver.chain_slices > self.data.batch:
            raise ConfigError(
                f"chain_slices = {solver.chain_slices}: must be at most the {self.data.batch} sequences of a batch"
            )
        if model.dropout and solver.chain_slices != 1 and solver.measure is not None:
            raise ConfigError(
                f"chain_slices = {solver.chain_slices} with dropout = {model.dropout}: error control compares with "
                "exact sweeps, which drop out other units; set chain_slices = 1, dropout = 0 or control = off"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From key -> value over all sections, for instance ``{"layers": 16, "lr": 3e-4}``.

        A preset stands for the keys that are not among them.
        """
        for name in values:
            if name not in KEYS:
                raise ConfigError(f"unknown key '{name}'{similar(name, KEYS)}")
        if values.get("preset") in _PRESETS:
            values = _PRESETS[values["preset"]] | dict(values)
        if values.get("preset") == "grow":
            layers, open_layers, close_layers = (
                values.get(name, KEYS[name].default) for name in ("layers", "open_layers", "close_layers")
            )
            values = {"coarse_networks": max(2, layers - open_layers - close_layers)} | dict(values)
        if values.get("multilevel") or values.get("task") == "translation":
            values = _WITHOUT_TERM | dict(values)
        sections: dict[str, Any] = {
            name: section(**{f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values})
            for name, section in SECTIONS.items()
        }
        if sections["model"].task == "vit" and sections["solver"].mu_by_default:
            sections["solver"] = dataclasses.replace(sections["solver"], consistency=_MU_OF_IMAGES)
        return cls(**sections)

    def flat(self) -> dict[str, Any]:
        """Key -> value over all sections."""
        return {name: value for section in vars(self).values() for name, value in vars(section).items()}


# The keys that presets stand for.
_KEY_OF = {option: name for name, option in _OPTIONS.items()}
_PRESETS: dict[str, dict[str, Any]] = {"cascade": CASCADE}
_PRESETS["grow"] = {_KEY_OF.get(option, option): value for option, value in GROW.items()} | {"schedule": "wsd"}
# Defaults where there is better no consistency term: coarse networks' gradients are not measured, and an interval that
# spans encoder and decoder goes on as it began.
_WITHOUT_TERM = {"forward_iters": 2, "coarse": "fitted"}
# On images the loss falls so far that a term of weight 1 outweighs it.
_MU_OF_IMAGES = 0.1
SECTIONS: dict[str, type[Section]] = get_type_hints(TrainConfig)
KEYS: dict[str, dataclasses.Field[Any]] = {
    f.name: f for section in SECTIONS.values() for f in dataclasses.fields(section)
}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a configuration file, e.g. ``[model]`` ``layers = 32``.

    Raises:
        ConfigError: if the file cannot be read, is no TOML, or holds an unknown section or key.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise ConfigError(f"config = {str(path)!r}: is longer than {_LONGEST:,} bytes, no configuration")
        tables = tomllib.loads(text.decode("utf-8-sig").replace("\r\n", "\n"))
    except OSError as error:
        raise ConfigError(f"config = {str(path)!r}: cannot be read ({error.strerror})") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config = {str(path)!r}: is not TOML ({error})") from None
    return dict(_flatten(tables, f"{path}: "))


def from_saved(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The keys and values of a configuration saved in a checkpoint (``dataclasses.asdict``).

    Keys that were taken out of [multilevel] are passed over where they had no effect: a coherence of 0, and rewarm,
    which went with optimizer_state = "reset" alone.
    """
    multilevel = tables.get("multilevel")
    if isinstance(multilevel, Mapping):
        known = {k: v for k, v in multilevel.items() if k != "rewarm" and (k, v) != ("coherence", 0)}
        tables = {**tables, "multilevel": known}
    return dict(_flatten(tables, "saved configuration: "))


def _flatten(tables: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for section, table in tables.items():
        if section not in SECTIONS or not isinstance(table, Mapping):
            raise ConfigError(f"{where}unknown section or key '{section}'; the sections are {', '.join(SECTIONS)}")
        known = [f.name for f in dataclasses.fields(SECTIONS[section])]
        for name, value in table.items():
            if name not in known:
                raise ConfigError(f"{where}unknown key '{name}' in [{section}]{similar(name, known)}")
            yield name, value
