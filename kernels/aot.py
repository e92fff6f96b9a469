"""Compiles every kernel for a GPU that is not there, and measures the result: registers, stack, shared memory, dots.

Each module of the package that has kernels offers `aot_launches(candidates)`: the launches to compile, on tensors of
torch's meta device, in their default configuration for bfloat16 and float32, or in all candidate configurations.

    python -m mlpint.kernels.aot [--candidates] [module ...]

prints one line a kernel and ends with 1 if one has a problem. Triton must not be interpreting.
"""

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .common import Launch

CAPABILITIES = (80, 90)
# Two registers put aside are nothing that a clock shows, and which versions of Triton differ by.
MOST_STACK = 8
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have: A100, H100
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
WGMMA_ROWS = 64  # Hopper's warpgroup instruction works on 64 rows; smaller dots take mma.sync there too
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """A launch as compiled: `registers` a thread, `stack` bytes a thread (spills are there), `shared` bytes."""

    name: str
    types: str
    configuration: str
    capability: int
    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]  # of "wgmma" and "mma.sync", those that occur
    problems: tuple[str, ...]

    def __str__(self):
        used = f"{self.registers:4d} registers {self.stack:4d} B stack {self.shared:7d} B shared"
        line = f"sm_{self.capability} {self.name:32s} {self.types:10s} {used}  {'+'.join(self.instructions) or '-':9s}"
        return f"{line} {self.configuration}" + "".join(f"\n  PROBLEM: {p}" for p in self.problems)


def signature(launch: Launch) -> tuple[dict, dict, dict]:
    """(types, constants, attributes) as the JIT would specialise the launch, given pointers aligned to 16 bytes."""
    types, constants, attributes = {}, {}, {}

    def describe(value, path):
        if isinstance(value, tuple):
            return tuple(describe(v, (*path, i)) for i, v in enumerate(value))
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    names = launch.kernel.arg_names
    for i, value in enumerate(launch.arguments):
        types[names[i]] = describe(value, (i,))
    for name, value in launch.constexprs.items():
        if name not in OPTIONS:
            types[name] = "constexpr"
            constants[(names.index(name),)] = value
    return types, constants, attributes


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile a launch for `capability` (80 for sm_80) and measure it."""
    types, constants, attributes = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in launch.constexprs.items() if name in OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    ptx = compiled.asm["ptx"]
    dots = r"^\s*{}\b.*\b[mM]\d+n\d+"
    instructions = tuple(name for name in ("wgmma", "mma.sync") if re.search(dots.format(name), ptx, re.MULTILINE))

    problems = []
    if stack > MOST_STACK:
        problems.append(f"{stack} bytes of stack: smaller blocks or more warps")
    if shared > SHARED_MEMORY[capability]:
        problems.append(f"{shared} bytes of shared memory, sm_{capability} has {SHARED_MEMORY[capability]}")
    problems += missing_instructions(compiled.asm["ttir"], instructions, capability)
    pointers = [t for t in types.values() if isinstance(t, str) and t.startswith("*")]
    return Compiled(
        name=launch.kernel.__name__,
        types=",".join(dict.fromkeys(pointers)),
        configuration=" ".join(f"{k}={v}" for k, v in launch.constexprs.items()),
        capability=capability,
        registers=registers,
        stack=stack,
        shared=shared,
        instructions=instructions,
        problems=tuple(problems),
    )


def missing_instructions(ttir: str, instructions: tuple[str, ...], capability: int) -> list[str]:
    """The dots of 16-bit operands in Triton's IR that tensor cores do not do, or on sm_90 not by warpgroups."""
    missing = []
    for rows, dtype in re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(\w+)> \*", ttir):
        wanted = "wgmma" if capability == 90 and int(rows) >= WGMMA_ROWS else "mma.sync"
        if dtype in ("bf16", "f16") and wanted not in instructions:
            missing.append(f"a {dtype} dot of {rows} rows without {wanted}")
    return missing


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) a thread, as the `cuobjdump` that comes with Triton reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return int(registers), int(stack)


def modules() -> dict[str, object]:
    """The modules of the package that have kernels, by name."""
    package = importlib.import_module(__package__)
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "aot"]
    package_modules = {name: importlib.import_module(f"{__package__}.{name}") for name in names}
    return {name: module for name, module in package_modules.items() if kernels(module)}


def kernels(module) -> set[str]:
    """Names of the kernels that a module defines, as against device functions: they end in `_kernel`."""
    return {
        name
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and value.__module__ == module.__name__
    }


def compile_module(module, candidates: bool = False) -> Iterator[Compiled]:
    """Compile what a module offers for every capability; a kernel that it does not offer is a RuntimeError."""
    seen = set()
    for launch in module.aot_launches(candidates):
        seen.add(launch.kernel.__name__)
        for capability in CAPABILITIES:
            yield compile_launch(launch, capability)
    if missing := kernels(module) - seen:
        raise RuntimeError(f"{module.__name__}.aot_launches leaves out {', '.join(sorted(missing))}: add it there")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels for sm_80 and sm_90 without a GPU.")
    parser.add_argument("--candidates", action="store_true", help="all candidate configurations, not the default's")
    parser.add_argument("modules", nargs="*", help="modules of mlpint.kernels; default: all that have kernels")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("Triton interprets: unset TRITON_INTERPRET")
    known = modules()
    if unknown := set(options.modules) - set(known):
        parser.error(f"no kernels in {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    failed = False
    for name in options.modules or known:
        for compiled in compile_module(known[name], options.candidates):
            print(compiled, flush=True)
            failed |= bool(compiled.problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
