"""The GPT against one written down in PyTorch's own modules, and checkpoints of such a one."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlpint import MGRIT, LayerParallel, checkpoint
from mlpint.training.config import OptimizerConfig
from mlpint.training.models import GPT, Shape
from mlpint.training.optimizer import make_optimizer

SHAPE = Shape(layers=6, dim=16, heads=2, ffn=24)


class PlainBlock(nn.Module):
    """The GPT's block as it was before it became mlpint.nn's: the same names, in another order."""

    def __init__(self, shape):
        super().__init__()
        self.heads = shape.heads
        self.ln1, self.ln2 = nn.LayerNorm(shape.dim), nn.LayerNorm(shape.dim)
        self.qkv, self.proj = nn.Linear(shape.dim, 3 * shape.dim), nn.Linear(shape.dim, shape.dim)
        self.up, self.down = nn.Linear(shape.dim, shape.ffn), nn.Linear(shape.ffn, shape.dim)

    def forward(self, x):
        batch, sequence, dim = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(batch, sequence, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, vocabulary, sequence, shape):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, shape.dim), nn.Embedding(sequence, shape.dim)
        self.blocks = nn.Sequential(*(PlainBlock(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])))


def trained(model, optimizer, steps):
    """Losses of so many steps on the same tokens."""
    tokens, losses = torch.randint(20, (3, 8), generator=torch.Generator().manual_seed(0)), []
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_with_blocks_of_pytorchs_modules_go_on(kind, wrapped, tmp_path):
    torch.manual_seed(0)
    config = OptimizerConfig(optimizer=kind, lr=1e-2)
    plain = PlainGPT(20, 8, SHAPE)
    plain_optimizer = make_optimizer(plain, config)
    trained(plain, plain_optimizer, 3)
    checkpoint.save(tmp_path, 3, plain, plain_optimizer)

    model = GPT(20, 8, SHAPE)
    assert set(model.state_dict()) == set(plain.state_dict())
    if wrapped:
        model.blocks = LayerParallel(model.blocks, MGRIT(levels=1), open_layers=1)
    optimizer = make_optimizer(model, config)
    checkpoint.load(tmp_path, model, optimizer)
    assert len(optimizer.state) == len(plain_optimizer.state)
    assert trained(model, optimizer, 4) == pytest.approx(trained(plain, plain_optimizer, 4), rel=1e-5)
    model.load_state_dict(plain.state_dict())


def test_gpt_starts_as_gpt2():
    torch.manual_seed(0)
    model = GPT(20, 8, Shape(layers=8, dim=128, heads=2))
    for block in model.blocks:
        for linear, deviation in ((block.qkv, 0.02), (block.up, 0.02), (block.proj, 0.005), (block.down, 0.005)):
            assert linear.weight.std().item() == pytest.approx(deviation, rel=0.05)
            assert not linear.bias.any()
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.weight is model.tokens.weight
    assert math.prod(model.blocks[0].up.weight.shape) == 4 * 128 * 128


def test_dropout_drops_increments_attention_and_embeddings():
    torch.manual_seed(0)
    model, tokens = GPT(20, 8, Shape(layers=2, dim=16, heads=2, dropout=0.5)), torch.arange(8).unsqueeze(0)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    settings = model.blocks[0].settings
    assert (settings.dropout, settings.attention_dropout, model.dropout.p) == (0.5, 0.5, 0.5)
