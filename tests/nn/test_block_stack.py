"""BlockStack alone; and, by programs/block_stack.py, as the layers of LayerParallel on several ranks."""

import copy

import pytest
import torch

from mlpint import MGRIT, LayerParallel
from mlpint import nn as mnn
from mlpint.layers import stack_evaluator
from mlpint.layers.saved_rows import SavedRows
from mlpint.layers.stack_evaluator import Slice, progressions, stacked_states
from mlpint.nn import batching
from mlpint.training.config import OptimizerConfig
from mlpint.training.optimizer import make_optimizer
from scenarios import check, names

JOBS = [("alone", 1), ("mpich", 2), ("mpich", 3), ("mpich", 4)]


@pytest.mark.parametrize("scenario", names("block_stack.py"))
@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_in_layer_parallel(scenario, launcher, ranks):
    check("block_stack.py", scenario, launcher, ranks)


def stack(layers=4, **settings):
    torch.manual_seed(0)
    return mnn.BlockStack(layers, 8, 2, **settings).double()


def test_starts_and_runs_as_its_blocks():
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(*(mnn.Block(8, 2, depth=4, dropout=0.2).double() for _ in range(4)))
    ours, x = stack(dropout=0.2), torch.randn(2, 5, 8, dtype=torch.float64)
    assert all(torch.equal(t, blocks.state_dict()[k]) for k, t in ours.state_dict().items())
    results = []
    for network in (blocks, ours):
        torch.manual_seed(5)
        y = network(x)
        y.square().sum().backward()
        results.append(y)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    for name, p in torch.nn.ModuleList(ours.to_blocks()).named_parameters():
        torch.testing.assert_close(p.grad, blocks.get_parameter(name).grad, rtol=1e-12, atol=1e-12)
    ours.load_state_dict(blocks.state_dict())
    blocks.load_state_dict(ours.state_dict())


def test_to_and_from_blocks():
    ours = stack(attention="full", norm="post", gelu="none", ffn=12, step_size=0.5).eval()
    ours.up_bias.requires_grad_(False)
    again = mnn.BlockStack.from_blocks(ours.to_blocks())
    assert again.settings == ours.settings and not again.training and not again.up_bias.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(again.parameters(), ours.parameters(), strict=True))
    blocks = ours.to_blocks()
    blocks[2].qkv.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"qkv.weight of block 2 is .* use an nn.ModuleList of blocks"):
        mnn.BlockStack.from_blocks(blocks)
    with pytest.raises(ValueError, match="block 1 has other settings than block 0"):
        mnn.BlockStack.from_blocks([mnn.Block(8, 2), mnn.Block(8, 4)])
    with pytest.raises(TypeError, match="block 0 is a Linear"):
        mnn.BlockStack.from_blocks([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="layers = 0: must be a positive integer"):
        mnn.BlockStack(0, 8, 2)


def test_state_dict_is_strict():
    ours = stack()
    state = ours.state_dict()
    for broken, text in (
        ({k: v for k, v in state.items() if k != "2.up.weight"}, "Missing key.*2.up.weight"),
        ({**state, "4.up.weight": state["0.up.weight"]}, "Unexpected key.*4.up.weight"),
        ({**state, "1.up.bias": torch.zeros(3)}, r"1.up.bias is \(3,\), here \(32,\)"),
    ):
        with pytest.raises(RuntimeError, match=text):
            copy.deepcopy(ours).load_state_dict(broken)


def test_only_lengths_beside_the_state():
    network = LayerParallel(stack(), MGRIT(cfactor=2))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"it was given 0 arguments and \['mask'\]; use an nn.ModuleList"):
        network(x, mask=x)
    with pytest.raises(TypeError, match="a tuple as its state"):
        network((x, x))
    with pytest.raises(ValueError, match="a block of dim 8 takes"):
        network(x[..., :4])


def test_errors_name_the_layers():
    network = LayerParallel(stack(8), MGRIT(cfactor=2))
    with pytest.raises(ValueError) as error:
        network(torch.randn(2, 5, 4, dtype=torch.float64))
    assert any("rank 0, layer 0, level 1, forward relaxation" in note for note in error.value.__notes__)


def test_weight_decay_is_for_matrices():
    ours = stack()
    decays, stays = (group["params"] for group in make_optimizer(ours, OptimizerConfig(weight_decay=0.1)).param_groups)
    assert {id(p) for p in decays} == {id(getattr(ours, f"{n}_weight")) for n in ("qkv", "proj", "up", "down")}
    assert len(stays) == 8


def test_progressions():
    assert progressions([3, 7, 11, 12]) == [range(3, 12, 4), range(12, 13)]
    assert progressions([5]) == [range(5, 6)] and progressions([]) == []
    for rows in ([0, 4, 8, 12, 13, 14, 20], [1, 2, 4, 8]):
        assert [r for run in progressions(rows) for r in run] == rows


def test_states_that_lie_together_are_not_copied():
    whole = torch.randn(4, 2, 3)
    slices = [Slice((t,), ((whole, i),)) for i, t in enumerate(whole)]
    for picked in (slices, slices[1:3], slices[::2]):
        x = stacked_states(picked)
        assert x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert torch.equal(x, torch.stack([s.tensors[0] for s in picked]))
    elsewhere = torch.randn(1, 2, 3)
    other = Slice((elsewhere[0],), ((elsewhere, 0),))
    for picked in ([slices[0], other], [slices[2], slices[1]], [slices[0], slices[1], slices[3]]):
        assert torch.equal(stacked_states(picked), torch.stack([s.tensors[0] for s in picked]))


def test_saved_rows_come_in_any_grouping():
    saved_rows, whole = SavedRows(), torch.randn(10, 3)
    saved_rows.put(range(0, 10, 2), (whole[::2].clone(),))
    for row in range(1, 10, 2):
        saved_rows.put(range(row, row + 1), (whole[row : row + 1],))
    for rows in (range(0, 10, 2), range(0, 10, 4), range(1, 10, 4), range(10), range(6, 7), range(3, 4)):
        assert torch.equal(saved_rows.get(rows)[0], whole[rows.start : rows.stop : rows.step]), rows
    saved_rows.drop(range(10))
    assert not saved_rows._at


def test_width():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert batching.width(8, 32, 64, cpu) == 8  # the aim's case goes in one step
    assert batching.width(8, 4096, 1024, cpu) == 1
    assert batching.width(64, 4096, 1024, gpu) == 64


@pytest.mark.parametrize("recompute", [False, True])
def test_under_autocast_weights_are_cast_once_in_a_pass(recompute, monkeypatch):
    casts, cast = [], stack_evaluator.for_products
    monkeypatch.setattr(stack_evaluator, "for_products", lambda w, dtype: casts.append(dtype) or cast(w, dtype))
    ours, x = mnn.BlockStack(8, 16, 2), torch.randn(2, 5, 16)
    network = LayerParallel(copy.deepcopy(ours), MGRIT(2, 2, 1, 1), recompute=recompute)
    one_by_one = LayerParallel(ours.to_blocks(), MGRIT(2, 2, 1, 1))
    for _ in range(2):  # the second pass casts what the optimiser has made of the weights
        results = []
        for layers in (network, one_by_one):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = layers(x)
            y.square().sum().backward()
            results.append(y.detach())
            with torch.no_grad():
                for p in layers.parameters():
                    p -= 0.01 * p.grad.clamp(-1, 1)
                    p.grad = None
        torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
    assert casts == [torch.bfloat16] * 2
