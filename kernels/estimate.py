"""Launch configurations for GPUs that nobody could measure on: ``python -m mlpint.kernels.estimate kernels/tuned``.

What is known: how kernels fare against PyTorch on a measured GPU, the bytes that each side moves, and what the
ahead-of-time compile for the other GPU says of a configuration: whether it fits, and how many programs a multiprocessor
holds. A kernel is taken

- where it was clearly the faster on the measured GPU, in the measured configuration if that fits, else in its default;
- for operations never measured that only move memory, where it moves clearly fewer bytes in fewer launches;
- for a gated linear map where the measured GPU has the ungated one clearly faster.

The files say ``"estimated": true``, come last, and give way to what ``mlpint tune`` measures.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from . import aot, tuned_files
from .tuned_files import Entry, Tuned

CLEARLY = 1.3  # times faster on the measured GPU
REGISTERS = 65536  # of a multiprocessor
MEASURED = {"ln_linear": "ln_linear", "linear_axpy": "linear_axpy", "ln_backward_add": "ln_backward"}  # module by name
# Passes over the larger tensor of either side, from nn/ops.py and nn/heads.py, in the kernel one launch: PyTorch, ours.
MOVED = {"gated_backward": (11 / 3, 5 / 3), "pack_heads": (6.0, 2.0)}
WIDTHS = {"gated_backward": (512, 1024, 2048, 4096, 8192, 16384), "pack_heads": (32, 64, 128)}


class Model:
    """What the compile for one capability says of configurations."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self._fits: dict[str, list[dict[str, int]]] = {}

    def fits(self, module: str) -> list[dict[str, int]]:
        """The configurations of a module whose launches all compile without problems, two programs at a time."""
        if module not in self._fits:
            loaded = importlib.import_module(f"{__package__}.{module}")
            good: dict[str, bool] = {}
            for launch in loaded.aot_launches(True):
                config = {name: v for name, v in launch.constexprs.items() if name in _chosen_by_configs(launch)}
                if config and launch.arguments[0].dtype == torch.bfloat16:
                    key = json.dumps(config)
                    good[key] = good.get(key, True) and self._is_good(launch)
            self._fits[module] = [json.loads(key) for key, is_good in good.items() if is_good]
        return self._fits[module]

    def _is_good(self, launch) -> bool:
        compiled = aot.compile_launch(launch, self.capability)
        threads = 32 * launch.constexprs["num_warps"]
        shared = aot.SHARED_MEMORY[self.capability]
        at_once = min(REGISTERS // (threads * max(compiled.registers, 32)), shared // max(compiled.shared, 1024))
        return not compiled.problems and at_once >= 2


def _chosen_by_configs(launch) -> set[str]:
    """Which of a launch's constants a configuration says; the others follow from shapes."""
    if launch.kernel.__name__ == "ln_backward_sum_kernel":  # always the same
        return set()
    chosen = {"BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_F", "GROUP_M", "TILES", "ROWS", "num_warps", "num_stages"}
    return chosen - {"BLOCK_K"} if "TILES" in launch.constexprs else chosen


def _default(module: str, e: Entry) -> dict[str, int]:
    loaded = importlib.import_module(f"{__package__}.{module}")
    if module == "ln_backward":
        return loaded.default_config(e.d, e.m, e.j)
    return loaded.default_config(e.d)


def estimates(measured: Tuned, capability: int) -> Iterator[Entry]:
    """Entries for a capability (80 for sm_80), from what was measured on one GPU."""
    model = Model(capability)
    alike = measured.capability[0] * 10 + measured.capability[1] == capability
    entries = [e for of_op in measured.entries.values() for e in of_op]
    for e in entries:
        gain = e.microseconds["torch"] / e.microseconds["triton"] if "triton" in e.microseconds else 0.0
        if e.op not in MEASURED or gain < CLEARLY or e.config is None:
            continue
        if not alike:  # GPUs of the measured architecture have its own file
            module = MEASURED[e.op]
            # How many rows of a norm's backward a block can hold depends on their width, which the default goes by.
            measured_fits = e.op != "ln_backward_add" and dict(e.config) in model.fits(module)
            config = dict(e.config) if measured_fits else _default(module, e)
            yield Entry(e.op, e.d, e.m, e.j, e.dtype, "triton", config, {})
        if e.op == "ln_linear" and model.fits("gated_linear"):
            yield Entry("gated_linear", e.d, e.m, e.j, e.dtype, "triton", model.fits("gated_linear")[0], {})
    for op, (theirs, ours) in MOVED.items():
        if theirs / ours < CLEARLY:
            continue
        for width in WIDTHS[op]:
            for m, j in ((256, 1), (256, 16), (1024, 16), (8192, 1)):
                shape = Entry(op, width, m, j, "bfloat16", "triton", None, {})
                config = _default(op, shape)
                if config in model.fits(op):
                    yield replace(shape, config=config)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.exit("python -m mlpint.kernels.estimate FOLDER: writes estimated-sm80.json and estimated-sm90.json there")
    (measured,) = (tuned_files.load(path) for path in tuned_files.SHIPPED.glob("nvidia-h200.json"))
    for capability, name in ((80, "estimated-sm80"), (90, "estimated-sm90")):
        path = Path(arguments[0], f"{name}.json")
        about = {"estimated": True, "from": measured.device, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        entries = list(estimates(measured, capability))
        tuned_files.write(path, f"any sm_{capability}", divmod(capability, 10), about, entries)
        print(f"{path}: {len(entries)} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
