"""The installed package at work in one process without MPI: a forward and a backward solve, held to plain PyTorch.

A script, so that it can be run on a wheel with nothing else installed (cibuildwheel's test-command).
"""

import copy

import torch

import mlpint


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        return x + 0.1 * torch.tanh(self.linear(x))


def main():
    torch.manual_seed(0)
    plain = torch.nn.ModuleList(Block(8) for _ in range(12)).double()
    # Three iterations over three coarse intervals reach the serial solution.
    options = mlpint.MGRIT(levels=2, cfactor=4, forward_iters=3, backward_iters=3)
    blocks = mlpint.LayerParallel(copy.deepcopy(plain), options)
    x = torch.randn(3, 8, dtype=torch.float64)

    y = blocks(x)
    y.square().sum().backward()
    z = x
    for layer in plain:
        z = layer(z)
    z.square().sum().backward()

    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    gradients = {name.removeprefix("layers."): p.grad for name, p in blocks.named_parameters()}
    assert gradients.keys() == expected.keys(), (sorted(gradients), sorted(expected))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)
    print("ok")


if __name__ == "__main__":
    main()
