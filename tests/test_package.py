"""The package as built and installed: what its extension links, what wheel and sdist hold, what an import does."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile

import mlpint

ROOT = Path(__file__).resolve().parent.parent
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+|ld-linux[\w-]*)\.so\.\d+")
FOREIGN_SYMBOLS = re.compile(r"P?MPI_|nccl|cuda|_ZNK?2at|_ZNK?3c10|_ZNK?5torch")


def module_file(name):
    return Path(importlib.util.find_spec(name).origin)


def foreign(path):
    """What an ELF file asks of others than the C and C++ run time: libraries by name, and symbols."""
    with open(path, "rb") as file:
        elf = ELFFile(file)
        needed = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        undefined = {s.name for s in elf.get_section_by_name(".dynsym").iter_symbols() if s["st_shndx"] == "SHN_UNDEF"}
    return {n for n in needed if not SYSTEM_LIBRARIES.fullmatch(n)} | {s for s in undefined if FOREIGN_SYMBOLS.match(s)}


def python(*arguments, cwd):
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """The sdist of this tree and the wheel built from that sdist, each in an isolated environment."""
    out = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--outdir", str(out), str(ROOT), cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_extension_needs_neither_torch_nor_mpi_nor_nccl_nor_libpython():
    assert foreign(module_file("mlpint._core")) == set()


def test_foreign_sees_what_others_link():
    (mpich,) = Path(module_file("mpi4py")).parent.glob("MPI.mpich*.so")
    assert {"libmpi.so.12", "MPI_Init"} <= foreign(mpich)
    assert "libc10.so" in foreign(Path(torch.__file__).parent / "lib" / "libtorch_python.so")


def test_extension_loads_without_torch(tmp_path):
    code = f"""
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("mlpint._core", {str(module_file("mlpint._core"))!r})
core = importlib.util.module_from_spec(importlib.util.spec_from_loader("mlpint._core", loader))
loader.exec_module(core)
assert core.SelfTransport().size == 1
assert "torch" not in sys.modules
"""
    python("-c", code, cwd=tmp_path)


def test_import_is_quiet_and_starts_nothing(tmp_path):
    code = """
import os, sys
import torch, numpy
def tasks():
    threads = os.listdir("/proc/self/task")
    return len(threads), [open(f"/proc/self/task/{t}/children").read() for t in threads]
before = tasks()
import mlpint
assert tasks() == before, (before, tasks())
heavy = {"mpi4py", "triton", "transformers", "matplotlib", "sklearn"} & set(sys.modules)
assert not heavy, heavy
assert not torch.distributed.is_initialized()
"""
    result = python("-c", code, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("", "")


def test_kernels_import_without_triton(tmp_path):
    python("-c", "import sys, mlpint.kernels as k; assert k.__doc__ and 'triton' not in sys.modules", cwd=tmp_path)


def test_public_names_exist():
    assert len(set(mlpint.__all__)) == len(mlpint.__all__)
    for name in mlpint.__all__:
        assert getattr(mlpint, name) is not None


def test_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert mlpint.__version__ == version("mlpint") == project["version"]


def test_works_alone(tmp_path):
    assert python(str(ROOT / "tests" / "alone.py"), cwd=tmp_path).stdout == "ok\n"


def test_wheel_holds_the_package_and_nothing_else(distributions):
    wheel = distributions[1]
    packages = {"mlpint": ROOT / "python" / "mlpint", "mlpint/kernels": ROOT / "kernels"}
    expected = {f"mlpint/{module_file('mlpint._core').name}"}
    for target, source in packages.items():
        files = [f for f in source.rglob("*") if f.is_file() and f.suffix not in (".pyc", ".so")]
        expected |= {f"{target}/{f.relative_to(source).as_posix()}" for f in files}
    info = f"mlpint-{mlpint.__version__}.dist-info/"
    expected |= {info + name for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert set(zipfile.ZipFile(wheel).namelist()) == expected


def test_wheel_holds_types_and_tuned_kernels(distributions):
    tuned = {f"mlpint/kernels/tuned/{table.name}" for table in (ROOT / "kernels" / "tuned").glob("*.json")}
    assert tuned
    assert {"mlpint/py.typed", "mlpint/_core.pyi", *tuned} <= set(zipfile.ZipFile(distributions[1]).namelist())


def test_wheel_extension_needs_nothing_foreign(distributions, tmp_path):
    with zipfile.ZipFile(distributions[1]) as archive:
        (extension,) = (name for name in archive.namelist() if name.endswith(".so"))
        assert foreign(archive.extract(extension, tmp_path)) == set()


def test_wheel_is_manylinux(distributions, tmp_path):
    shown = " ".join(python("-m", "auditwheel", "show", str(distributions[1]), cwd=tmp_path).stdout.split())
    assert re.search(r'platform tag: "manylinux_2_\d+_\w+"', shown), shown


def test_sdist_holds_all_that_a_build_needs(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "CMakeLists.txt", "pyproject.toml", "kernels/__init__.py"} <= names
    assert {f.relative_to(ROOT).as_posix() for f in (ROOT / "csrc").rglob("*.[ch]pp")} <= names
    stray = {n for n in names if n.startswith((".venv", "build/", "dist/")) or n.endswith((".so", ".pyc"))}
    assert stray == set()
