"""The optimisers of ``mlpint train`` against torch's own, on the same layers one by one."""

import pytest
import torch
from torch import nn

from mlpint import MGRIT, LayerParallel, checkpoint
from mlpint.nn import Block, BlockStack
from mlpint.training.config import OptimizerConfig
from mlpint.training.muon import MuonWithAdamW
from mlpint.training.optimizer import make_optimizer

STEPS = 4


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        torch.manual_seed(1)
        self.edge, self.blocks = nn.Linear(8, 8), blocks

    def forward(self, x):
        return self.blocks(self.edge(x))


def layers(count=4):
    torch.manual_seed(0)
    return [Block(8, 2) for _ in range(count)]


def train(model, optimizers, steps=STEPS):
    losses = []
    for step in range(steps):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("stacked", [False, True])
def test_muon_of_a_layers_matrices_is_torchs(stacked, tmp_path):
    plain = Model(nn.Sequential(*layers()))
    of_layers = [p for p in plain.blocks.parameters() if p.dim() == 2]
    matrices, rest = [plain.edge.weight], [p for p in plain.parameters() if p.dim() == 1]
    expected = train(
        plain,
        [
            torch.optim.Muon(of_layers, lr=0.02, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(matrices, lr=0.02, weight_decay=0.2, betas=(0.9, 0.95)),
            torch.optim.AdamW(rest, lr=0.02, weight_decay=0.0, betas=(0.9, 0.95)),
        ],
    )
    config = OptimizerConfig(optimizer="muon", lr=0.02, weight_decay=0.2, beta2=0.95)
    blocks = BlockStack.from_blocks(layers()) if stacked else layers()
    model = Model(LayerParallel(blocks, MGRIT(levels=1)))
    optimizer = make_optimizer(model, config)
    assert train(model, [optimizer]) == pytest.approx(expected, rel=1e-4)
    assert all(s["momentum_buffer"].shape == p.shape for p, s in optimizer.state.items() if "momentum_buffer" in s)

    checkpoint.save(tmp_path, STEPS, model, optimizer)
    further = train(model, [optimizer])
    again = Model(LayerParallel(BlockStack.from_blocks(layers()) if not stacked else layers(), MGRIT(levels=1)))
    resumed = make_optimizer(again, config)
    checkpoint.load(tmp_path, again, resumed)
    assert train(again, [resumed]) == pytest.approx(further, rel=1e-4)


def test_muon_is_for_matrices():
    with pytest.raises(ValueError, match=r"not for a parameter of shape torch.Size\(\[3\]\)"):
        MuonWithAdamW([{"params": [nn.Parameter(torch.ones(3))], "muon": True}], lr=0.1, betas=(0.9, 0.95))


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(Exception, match="optimizer = 'muon': torch .* has no torch.optim.Muon, which came with 2.9"):
        make_optimizer(Model(nn.Sequential(*layers(1))), OptimizerConfig(optimizer="muon"))
