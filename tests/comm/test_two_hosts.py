"""Two hosts, each a network namespace with torchrun: training, a host that is lost, a host that is not found."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAM = """
import copy, sys, time
import torch
from torch import nn
import mlpint
from mlpint import MGRIT, LayerParallel

comm = mlpint.init()
torch.manual_seed(0)
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        return x + torch.tanh(self.linear(x))
layers = [Layer() for _ in range(4)]
stack = LayerParallel(copy.deepcopy(layers), MGRIT(levels=1), comm=comm)
nets = [(stack, [*stack.parameters()]), (nn.Sequential(*layers), [p for l in layers for p in l.parameters()])]
steps = 3 if sys.argv[1] == "train" else 100000
for step in range(steps):
    losses = []
    for net, parameters in nets:
        loss = net(torch.ones(2, 4)).square().sum()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in parameters:
                p -= 0.01 * p.grad
                p.grad = None
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[1], losses
    if step == 2:
        print("three steps", flush=True)
"""


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two namespaces with a cable between them: 10.77.0.1 on end0 of the one, 10.77.0.2 on end1 of the other."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here to make network namespaces with")
    names = [f"mlpint-{os.getpid()}-{n}" for n in (0, 1)]
    if (made := ip("netns", "add", names[0], check=False)).returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "end0", "netns", names[0], "type", "veth", "peer", "name", "end1", "netns", names[1])
        for n, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{n + 1}/24", "dev", f"end{n}")
            ip("-n", name, "link", "set", f"end{n}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


@contextmanager
def launched(hosts, tmp_path, mode, env):
    """A torchrun on each host; ends them with all that they have started."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --master-addr=10.77.0.1".split()
    jobs = []
    with ExitStack() as files:
        for n, host in enumerate(hosts):
            out = files.enter_context(open(tmp_path / f"out{n}", "w"))
            own = {k: v.format(n=n) for k, v in env.items()}
            command = ["ip", "netns", "exec", host, *run, "--master-port=29577", f"--node-rank={n}", str(program), mode]
            jobs.append(
                subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "MLPINT_STALL_LIMIT": "6"} | own,
                    start_new_session=True,
                )
            )
        try:
            yield jobs
        finally:
            for job in jobs:
                if job.poll() is None:
                    os.killpg(job.pid, signal.SIGKILL)
                    job.wait()


def printed(tmp_path: Path) -> str:
    return "\n".join((tmp_path / f"out{n}").read_text() for n in (0, 1))


INTERFACES = {"GLOO_SOCKET_IFNAME": "end{n}"}


@pytest.mark.slow
def test_training_and_a_host_that_is_lost(hosts, tmp_path):
    """Exact on two hosts; when the cable is cut, both ends know within the limit."""
    with launched(hosts, tmp_path, "train", INTERFACES) as jobs:
        assert [job.wait(60) for job in jobs] == [0, 0], printed(tmp_path)
    assert printed(tmp_path).count("three steps") == 2
    with launched(hosts, tmp_path, "go on", INTERFACES) as jobs:
        limit = time.monotonic() + 60
        while printed(tmp_path).count("three steps") < 2 and time.monotonic() < limit:
            time.sleep(0.1)
        ip("-n", hosts[1], "link", "set", "end1", "down")
        cut = time.monotonic()
        codes = [job.wait(90) for job in jobs]
        assert 0 not in codes and time.monotonic() - cut < 60, printed(tmp_path)
    assert "nothing moved for 6 s" in printed(tmp_path) or "connection" in printed(tmp_path), printed(tmp_path)


@pytest.mark.slow
def test_a_host_whose_name_means_itself_is_told_which_variable_to_set(hosts, tmp_path):
    """gloo goes by the host's name, which is 127.0.0.1 for both: they do not meet, and none of them waits for ever."""
    with launched(hosts, tmp_path, "train", {"GLOO_SOCKET_IFNAME": "lo"}) as jobs:
        started = time.monotonic()
        codes = [job.wait(90) for job in jobs]
        assert 0 not in codes and time.monotonic() - started < 75, printed(tmp_path)
    assert "GLOO_SOCKET_IFNAME" in printed(tmp_path), printed(tmp_path)
