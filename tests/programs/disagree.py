"""Ranks that do not do the same thing. argv: what differs on the last rank."""

import sys

import torch
from layers import Residual

import mlpint
from mlpint import MGRIT, LayerParallel

what = sys.argv[1]
comm = mlpint.init()
odd = comm.rank == comm.size - 1
torch.manual_seed(0)
layers = [Residual(8 if odd and what == "layer shapes" else 4) for _ in range(5 if odd and what == "depth" else 6)]
cfactor = 3 if odd and what == "options" else 2
stack = LayerParallel(layers, MGRIT(cfactor=cfactor), comm=comm)
print("constructed", flush=True)
if odd and what == "replaced options":
    stack.options = MGRIT(cfactor=2, forward_iters=5)
if odd and what == "mode":
    stack.eval()
x = torch.randn(2 if odd and what == "batch size" else 3, 4, dtype=torch.float64 if odd and what == "dtype" else None)
if odd and what == "dtype":
    stack.double()
if odd and what == "skipped pass":
    stack.state_dict()
with torch.set_grad_enabled(not (odd and what == "gradients")):
    y = stack(x)
if odd and what == "skipped backward":
    stack(x)
y.sum().backward()
print("through", flush=True)
