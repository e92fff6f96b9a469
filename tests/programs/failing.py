"""A training loop in which the last rank fails in the second step. argv: how, where, file for the time at which it did.

Where: "forward" or "backward", in a layer; "script", between two steps; "end", after the last, where others still wait;
"waiting", on the rank that waits for the last. "nowhere" and "uneven end" are runs without a failure, which note when
the last rank came to its end and when it was let go.
"""

import atexit
import os
import signal
import sys
import time
from pathlib import Path

import torch
from layers import Residual

import mlpint
from mlpint import MGRIT, LayerParallel

how, where, file = sys.argv[1:]
torch.set_num_threads(1)


@atexit.register  # before the guard's own, and so run after it
def let_go():
    if comm.rank == 0:
        Path(file + ".left").write_text(str(time.time()))


comm = mlpint.init()
fails = comm.rank == (0 if where == "waiting" else comm.size - 1)


def fail():
    Path(file).write_text(str(time.time()))
    if how == "raise":
        raise ValueError("boom")
    if how.startswith("exit"):
        sys.exit(int(how[4:]))
    if how.startswith("leave"):
        os._exit(int(how[5:]))
    signal.raise_signal(signal.Signals[how])  # stopped, killed or interrupted; nothing else comes back from it


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        fail()
        return grad


class Failing(Residual):
    armed = False

    def forward(self, x):
        if self.armed and where == "forward":
            fail()
        if self.armed and where == "backward":
            x = FailingBackward.apply(x)
        return super().forward(x)


torch.manual_seed(0)  # the same layers on every rank
layers = [Residual() for _ in range(7)] + [Failing()]
blocks = LayerParallel(layers, MGRIT(cfactor=2, forward_iters=1, backward_iters=1), comm=comm)
for step in range(3):
    if step == 1 and fails:
        layers[-1].armed = True
        if where == "script":
            fail()
        if where == "waiting":
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            signal.signal(signal.SIGALRM, lambda *_: fail())
    if step == 1 and where == "waiting" and not fails:
        time.sleep(60)
    blocks(torch.randn(2, 4, requires_grad=True)).sum().backward()
if where == "end":
    if fails:
        fail()
    comm.barrier()
if comm.rank == 0:
    time.sleep(2.5 if where == "uneven end" else 0)
    Path(file).write_text(str(time.time()))
