"""Multilevel training written out: lists of blocks, gradients by autograd.grad, optimisers by their formulas."""

import copy

import torch
from torch import nn


class Block(nn.Module):
    """x + W2 tanh(W1 x)."""

    def __init__(self, dim=4, ffn=6):
        super().__init__()
        self.up, self.down = nn.Linear(dim, ffn), nn.Linear(ffn, dim)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, layers, dim=4, container=nn.Sequential):
        super().__init__()
        self.embed, self.head = nn.Linear(3, dim), nn.Linear(dim, 2)
        self.blocks = (
            container(Block(dim) for _ in range(layers))
            if container is nn.ModuleList
            else container(*(Block(dim) for _ in range(layers)))
        )

    def forward(self, x):
        x = self.embed(x)
        if isinstance(self.blocks, nn.ModuleList):
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks(x)
        return self.head(x)

    def loss(self, batch):
        return (self(batch[0]) - batch[1]).square().mean()


def batches(count, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randn(5, 2, generator=g, dtype=torch.float64))
        for _ in range(count)
    ]


class Weights:
    """A parameter and the optimiser's state of it."""

    def __init__(self, value):
        self.value, self.m, self.v, self.t = value, None, None, 0

    def copy(self):
        return copy.deepcopy(self)


def sgd(w, g, lr):
    w.value = w.value - lr * g


def momentum(w, g, lr, mu=0.9):
    w.m = g if w.m is None else mu * w.m + g
    w.value = w.value - lr * w.m


def adamw(w, g, lr, b1=0.9, b2=0.99, eps=1e-8, decay=0.1):
    w.t += 1
    w.m = (1 - b1) * g + (b1 * w.m if w.m is not None else 0)
    w.v = (1 - b2) * g * g + (b2 * w.v if w.v is not None else 0)
    w.value = w.value * (1 - lr * decay)
    w.value = w.value - lr * (w.m / (1 - b1**w.t)) / ((w.v / (1 - b2**w.t)).sqrt() + eps)


class Reference:
    """The training of a :class:`Net`, whose weights it reads once."""

    def __init__(self, net, rule, lr, *, delta, networks=2, ode=True, state="restrict", neighbours="none"):
        self.rule, self.lr, self.delta, self.networks, self.ode = rule, lr, delta, networks, ode
        self.state, self.neighbours = state, neighbours
        self.shared = {n: Weights(p.detach().clone()) for n, p in net.named_parameters() if "blocks" not in n}
        self.blocks = [{n: Weights(p.detach().clone()) for n, p in b.named_parameters()} for b in net.blocks]

    def loss(self, blocks, h, batch):
        s = {n: w.value for n, w in self.shared.items()}
        x = batch[0] @ s["embed.weight"].T + s["embed.bias"]
        for b in blocks:
            inner = torch.tanh(x @ b["up.weight"].value.T + b["up.bias"].value)
            x = x + h * (inner @ b["down.weight"].value.T + b["down.bias"].value)
        return (x @ s["head.weight"].T + s["head.bias"] - batch[1]).square().mean()

    def step(self, blocks, h, batch):
        weights = [*self.shared.values(), *(w for b in blocks for w in b.values())]
        for w in weights:
            w.value = w.value.detach().requires_grad_()
        loss = self.loss(blocks, h, batch)
        gradients = torch.autograd.grad(loss, [w.value for w in weights])
        for w, g in zip(weights, gradients, strict=True):
            w.value = w.value.detach()
            self.rule(w, g, self.lr)
        return float(loss.detach())

    def start(self, w, ratio):
        """A coarse copy of a weight, with its state."""
        new = w.copy()
        if self.state == "restrict":
            new.m = None if w.m is None else w.m * ratio
            new.v = None if w.v is None else w.v * ratio**2
        return new

    def finish(self, w, coarse, ratio):
        d = self.delta
        w.value = (1 - d) * w.value + d * coarse.value
        if self.state == "restrict":
            w.m = None if coarse.m is None else (1 - d) * w.m + d * coarse.m / ratio
            w.v = None if coarse.v is None else (1 - d) ** 2 * w.v + d**2 * coarse.v / ratio**2
            w.t = coarse.t
        else:
            w.m, w.v, w.t = coarse.m, coarse.v, coarse.t

    def train(self, blocks, h, steps, cycles, coarse_steps, stream, name="", order="AB", single=False):
        """The plan of method.md, section 5, recursively; blocks are changed in place. Returns the losses."""
        losses = []
        for i in range(steps):
            losses.append((name or "fine", self.step(blocks, h, next(stream))))
            if not cycles or i >= cycles[0]:
                continue
            c, ratio = self.networks, float(self.networks) if self.ode else 1.0
            kinds = list(range(1 if single else c))
            if order == "BA" or order == "alternating" and i % 2:
                kinds.reverse()
            for k in kinds:
                places = range(c - 1 - k, len(blocks), c)
                child = name + chr(ord("A") + k)
                coarse = [{n: self.start(w, ratio) for n, w in blocks[j].items()} for j in places]
                losses += self.train(
                    coarse, h * ratio, coarse_steps[0], cycles[1:], coarse_steps[1:], stream, child, order, single
                )
                for j, trained in zip(places, coarse, strict=True):
                    for n, w in trained.items():
                        for other in range(j // c * c, j // c * c + c):
                            if other != j and self.neighbours == "average":
                                q = blocks[other][n]
                                q.value = (1 - self.delta) * q.value + self.delta * w.value
                        self.finish(blocks[j][n], w, ratio)
        return losses

    def error(self, net):
        """Largest difference to the weights of a net."""
        found = dict(net.named_parameters())
        pairs = [(w.value, found[n]) for n, w in self.shared.items()]
        pairs += [(w.value, found[f"blocks.{i}.{n}"]) for i, b in enumerate(self.blocks) for n, w in b.items()]
        return max(float((a - b.detach()).abs().max()) for a, b in pairs)
