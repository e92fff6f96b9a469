"""Replicas of what lies outside the stack, over a thousand steps."""

import torch
from layers import Residual
from replaced import Language
from runner import run
from torch import nn
from torch.nn import functional as F

import mlpint
from mlpint import MGRIT
from mlpint.hf import parallelize
from mlpint.parallel.replicas import check_replicas


def a_thousand_steps(comm):
    """Replicas stay equal to the last bit through inexact gradients, clipping, dropout and AdamW."""
    torch.manual_seed(comm.rank)
    model = Language("sequential", dropout=0.1)
    model.blocks = nn.Sequential(*[Residual(16) for _ in range(6)])
    parallelize(model, MGRIT(cfactor=2, forward_iters=1, backward_iters=1), comm=comm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = model.embedding.weight.detach().clone()
    batches = torch.Generator().manual_seed(7)
    losses = []
    for step in range(1000):
        first = torch.randint(20, (4, 1), generator=batches)
        ids = (first + torch.arange(6)) % 20  # to be learnt: count upwards
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        mlpint.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 250 == 249:
            assert check_replicas(model) == [], f"step {step}"
    assert len(set(comm.gather(repr(losses).encode()))) == 1
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50]), (losses[:3], losses[-3:])
    assert not torch.equal(model.embedding.weight, start)


if __name__ == "__main__":
    run([a_thousand_steps])
