"""What README.md and the pages of docs/ tell to type runs as printed: examples, commands (made small), launch files."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import prefix, run
from mlpint.training.metrics import read_lines
from test_docs import PAGES, ROOT

BIN = Path(sys.executable).parent
UNRUN = {
    "docs/benchmarks.md",
    "docs/experiments.md",
    "docs/families.md",
}  # hours; their scripts have tests of their own
SMALL = "--dim 16 --heads 2 --sequence 8 --batch 4 --eval-every 0 --eval-batches 1 --sample 0 --compare 1"
COMMAND = "import sys; from mlpint.cli import main; sys.exit(max(main(run) for run in {}))"


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def commands():
    """Those that start mlpint, in the order of the documents, as (launcher, ranks, arguments)."""
    for document in ["README.md", *PAGES]:
        for line in "".join(blocks(document, "sh")).splitlines() if document not in UNRUN else ():
            words = shlex.split(line, comments=True)
            if "mlpint" not in words:
                assert words[:1] in ([], ["make"]), line
                continue
            at = words.index("mlpint")
            launcher = {"mpirun": "mpich", "torchrun": "torchrun"}.get(words[0], "alone")
            ranks = int(words[2]) if launcher != "alone" else 1
            assert words[:at] in (
                [],
                ["mpirun", "-n", f"{ranks}"],
                f"torchrun --nproc-per-node {ranks} --no-python".split(),
            )
            yield launcher, ranks, words[at + 1 :]


def small(arguments):
    """A training run of two steps of a small network; other commands as they are."""
    if arguments[0] != "train":
        return arguments
    if "--resume" in arguments:
        return [*arguments, "--steps", "3", "--sample", "0"]
    steps = ["--steps", "2", "--layers", "12", *SMALL.split()]
    if {"examples/multilevel.toml", "--multilevel"} & {*arguments}:
        steps += ["--coarse-steps", "2", "--layers", "8", "--compare", "0"]
    return arguments + steps


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The directory in which all commands have run, those of a launcher in one job."""
    place = tmp_path_factory.mktemp("commands")
    (place / "examples").symlink_to(ROOT / "examples")
    groups = {}
    for launcher, ranks, arguments in commands():
        replicas = "--data-parallel" in arguments
        groups.setdefault((launcher == "alone", launcher, ranks, replicas), []).append(small(arguments))
    assert len(groups) >= 4 and sum(map(len, groups.values())) >= 20
    here = os.getcwd()
    os.chdir(place)
    try:
        for (_, launcher, ranks, _), runs in sorted(groups.items()):  # alone last: reports of the others' runs
            result = run(COMMAND.format(runs), ranks, launcher, timeout=240)
            assert result.returncode == 0, f"{runs}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    finally:
        os.chdir(here)
    return place


def test_commands_run_as_printed(everything):
    pages = {path.name for path in everything.glob("*.html")}
    assert pages == {"report.html", "first.html", "flops.html"}
    assert {path.name for path in (everything / "runs").iterdir()} >= {
        "001",
        "deep",
        "first",
        "exact",
        "resumed",
        "plain",
    }


def test_each_key_of_metrics_is_told(everything):
    told = set(re.findall(r"`([\w.]+)`", (ROOT / "docs" / "log.md").read_text()))
    found = set()
    for path in everything.glob("runs/*/metrics.jsonl"):
        for line in read_lines(path):
            control = line.get("control") or {}
            for part in (line, control, control.get("measured") or {}, line.get("comparison") or {}):
                found |= {key for key in part if not key.startswith(("val_", "test_"))}
    assert {"loss", "cosine", "gradient_cosine", "flops", "network"} <= found
    assert found - told - {"images", "words"} == set()  # what ``unit`` says


@pytest.mark.parametrize(("document", "ranks"), [("README.md", 2), ("docs/huggingface.md", 2)])
def test_examples_run_when_pasted(document, ranks):
    (source, *_) = blocks(document, "python")
    result = run(source.replace("range(150)", "range(50)"), ranks, "mpich", timeout=120).check()
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", result.stdout)]
    if document == "README.md":
        assert len(losses) == 2 and losses[1] < 3, result.stdout  # log 256 = 5.5 at first
    else:
        assert len(losses) == 1 and 5 < losses[0] < 6


# In one write, which no other rank's comes between.
RANKS = "import os, mlpint; comm = mlpint.init(); os.write(1, f'rank {comm.rank} of {comm.size}\\n'.encode())"


def told(processes):
    out = "".join(process.communicate(timeout=100)[0] for process in processes)
    assert all(process.returncode == 0 for process in processes), out
    return sorted(re.findall(r"rank \d of \d", out)), out


def start(file, environment, *arguments, path=BIN):
    environment = os.environ | {"PATH": f"{path}:{BIN}:{os.environ['PATH']}"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([ROOT / "examples" / "launch" / file, *arguments], env=environment, **pipes)


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
def test_mpirun_with_a_host_file(mpi, tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\n" if mpi == "openmpi" else "localhost\n")
    library = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}[mpi]
    environment = {"RANKS": "2", "HOSTS": str(tmp_path / "hosts"), "MPI4PY_LIBMPI": str(prefix(mpi) / "lib" / library)}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = start("mpirun.sh", environment, sys.executable, "-c", RANKS, path=prefix(mpi) / "bin")
    ranks, out = told([process])
    assert ranks == ["rank 0 of 2", "rank 1 of 2"], out


def test_torchrun_on_two_nodes(tmp_path):
    (tmp_path / "mine.py").write_text(RANKS)
    common = {"NODES": "2", "FIRST": "127.0.0.1", "PORT": str(20000 + os.getpid() % 20000)}
    nodes = [start("torchrun.sh", common | {"NODE": str(n)}, str(tmp_path / "mine.py")) for n in range(2)]
    ranks, out = told(nodes)
    assert ranks == ["rank 0 of 2", "rank 1 of 2"], out


def test_launch_files_say_what_they_lack():
    for file in ("mpirun.sh", "torchrun.sh", "slurm.sh"):
        subprocess.run(["sh", "-n", ROOT / "examples" / "launch" / file], check=True)
    process = start("torchrun.sh", {"NODE": "0", "NODES": "2"}, "mine.py")
    assert "FIRST: the address of node 0" in process.communicate()[0] and process.returncode
