"""check_block passes what the solver can use and names what it cannot."""

import pytest
import torch
from torch import nn

from mlpint.parallel.testing import check_block


class Good(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 6), nn.Dropout(dropout)

    def forward(self, x, mask=None):
        y = self.dropout(torch.tanh(self.linear(x)))
        return x + (y if mask is None else y * mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_residual_blocks_pass(dtype):
    check_block(Good().to(dtype), torch.randn(3, 6, dtype=dtype))
    check_block(Good(0.5).to(dtype), torch.randn(3, 6, dtype=dtype))
    check_block(Good().to(dtype), torch.randn(3, 6, dtype=dtype), mask=torch.ones(6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kinks_are_no_errors(dtype):
    for seed in range(40):
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.1).to(dtype)
        check_block(layer, torch.randn(2, 5, 8, dtype=dtype))


def test_transformer_layers_and_tuples_pass():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.1)
    check_block(layer, torch.randn(2, 5, 8))

    class Pair(Good):
        def forward(self, state):
            x, y, lengths = state
            return x, y + self.linear(y) + x.mean(), lengths

    with pytest.warns(UserWarning, match="Pair mixes the samples of a batch.*chain_slices"):
        check_block(Pair(), (torch.randn(2, 6), torch.randn(2, 6), torch.tensor([1, 2])))


class Shape(Good):
    def forward(self, x):
        return x[:, :3]


class Dtype(Good):
    def forward(self, x):
        return (x + self.linear(x)).double()


class InPlace(Good):
    def forward(self, x):
        return x.add_(self.linear(x))


class Counter(Good):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls * self.linear(x)


class OwnGenerator(Good):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return x + torch.rand(x.shape, generator=self.generator)


class Norm(Good):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return x + self.norm(x)


class Detached(Good):
    def forward(self, x):
        return (x + self.linear(x)).detach()


class WrongBackward(Good):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 3

    def forward(self, x):
        return x + self.Double.apply(self.linear(x))


class Partial(Good):
    def forward(self, state):
        return state[0] + self.linear(state[0]), state[0] * 2


@pytest.mark.parametrize(
    ("block", "x", "text"),
    [
        (Shape(), None, "turned 3x6 float32 cpu into 3x3 float32 cpu"),
        (Dtype(), None, "into 3x6 float64 cpu"),
        (InPlace(), None, "InPlace changes its input in place"),
        (Counter(), None, "Counter is not replayable"),
        (OwnGenerator(), None, "default generators only"),
        (Norm(), None, "changes its own 'norm.running_mean'"),
        (Detached(), None, "not differentiable"),
        (WrongBackward(), None, "disagrees with a finite difference"),
        (Partial(), (torch.randn(2, 6), torch.randn(2, 6)), "part of its input does not reach its output"),
    ],
)
def test_what_cannot_be_a_layer_is_named(block, x, text):
    with pytest.raises(ValueError, match=text):
        check_block(block, torch.randn(3, 6) if x is None else x)


def test_the_block_and_the_random_state_are_left_as_they_were():
    block = Norm()
    dropping, state = Good(0.5), torch.get_rng_state()
    before = {k: v.clone() for k, v in block.state_dict().items()}
    with pytest.raises(ValueError):
        check_block(block, torch.ones(3, 6))
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
    check_block(dropping, torch.ones(3, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in block.parameters())
