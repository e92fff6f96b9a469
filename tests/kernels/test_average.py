"""Prolongation averaging over stacked parameters, against torch.lerp in float64."""

import pytest
import torch
from torch import library

from mlpint.kernels import average

ODD = [(5, 3), (300,), (2, 40, 8), (1,)]
ALIGNED = [(16, 32), (64,)]


def stacks(layers, shapes, dtype, device, gap=1):
    """One stack [layers, *shape] a shape; `gap` - 1 unused layers lie between two."""
    return [torch.randn(gap * layers, *shape, device=device).to(dtype)[::gap] for shape in shapes]


def expected(fine, coarse, layers, delta):
    """Averaged stacks in float64."""
    new = [f.detach().double() for f in fine]
    for n, c in zip(new, coarse, strict=True):
        n[layers] = (1 - delta) * n[layers] + delta * c.double()
    return new


@pytest.mark.parametrize("shapes", [ODD, ALIGNED], ids=["odd", "aligned"])
@pytest.mark.parametrize("layers, count", [(slice(1, None, 2), 3), (slice(0, None, 2), 4), (slice(3, 5), 2)])
@pytest.mark.parametrize("config", [{"BLOCK": 64, "num_warps": 4}, {"BLOCK": 512, "num_warps": 4}])
def test_average(device, poisoned, monkeypatch, shapes, layers, count, config):
    monkeypatch.setattr(average, "default_config", lambda: config)
    fine, coarse = stacks(7, shapes, torch.float32, device), stacks(count, shapes, torch.float32, device, gap=2)
    shadow = [torch.full(f.shape, float("nan"), dtype=torch.bfloat16, device=device) for f in fine]
    before, new = [f.clone() for f in fine], expected(fine, coarse, layers, 0.3)

    change = average.average_(fine, coarse, layers, 0.3, shadow)

    assert change.dtype == torch.float32 and change.shape == (len(shapes),)
    for i, f in enumerate(fine):
        torch.testing.assert_close(f.double(), new[i], rtol=1e-6, atol=1e-6)
        stored = (f.double() - before[i].double()).square().sum()
        torch.testing.assert_close(change[i].double(), stored, rtol=1e-5, atol=0)
        written = torch.zeros(7, dtype=torch.bool, device=device)
        written[layers] = True
        assert torch.equal(f[~written], before[i][~written])
        assert torch.equal(shadow[i][written], f[written].bfloat16()), "the shadow is not the rounded average"
        assert shadow[i][~written].isnan().all(), "the shadow of a layer that was not averaged was written"


@pytest.mark.parametrize("delta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtypes", ["bfloat16 float32", "float32 bfloat16", "float64 float64"])
def test_dtypes_agree_with_the_reference(device, dtypes, delta):
    dtype, coarse_dtype = dtypes.split()
    fine = stacks(4, ODD, getattr(torch, dtype), device)
    coarse = stacks(2, ODD, getattr(torch, coarse_dtype), device)
    other = [f.clone() for f in fine]
    change = average.average_(fine, coarse, slice(0, None, 2), delta)
    rounding = 8e-3 if dtype == "bfloat16" else 1e-6
    reference = average.average_reference(other, coarse, slice(0, None, 2), delta)
    torch.testing.assert_close(change, reference, rtol=10 * rounding, atol=0)
    for f, o, c in zip(fine, other, coarse, strict=True):
        torch.testing.assert_close(f, o, rtol=rounding, atol=1e-6)
        if delta == 1:
            assert torch.equal(f[::2], c.to(f.dtype)), "delta 1 takes the coarse values exactly"


def test_more_tensors_than_one_launch_holds(device):
    shapes = [(i % 5 + 1,) for i in range(average.MAX_TENSORS + 3)]
    fine, coarse = stacks(2, shapes, torch.float32, device), stacks(2, shapes, torch.float32, device)
    other = [f.clone() for f in fine]
    change = average.average_(fine, coarse, slice(None), 0.25)
    torch.testing.assert_close(change, average.average_reference(other, coarse, slice(None), 0.25))
    for f, o in zip(fine, other, strict=True):
        torch.testing.assert_close(f, o)


def test_the_sum_is_the_same_every_time_and_no_layer_is_no_work(device):
    fine, coarse = stacks(3, [(1000,)], torch.float32, device), stacks(3, [(1000,)], torch.float32, device)
    first, second = (average.average_([f.clone() for f in fine], coarse, slice(None), 0.5) for _ in range(2))
    assert torch.equal(first, second)
    assert average.average_(fine, [c[:0] for c in coarse], slice(3, None), 0.5).tolist() == [0.0]


def test_parameters_are_averaged_in_place(device):
    fine = [f.requires_grad_() for f in stacks(4, [(6,)], torch.float32, device)]
    version = fine[0]._version
    average.average_(fine, [torch.ones(2, 6, device=device)], slice(0, 2), 1.0)
    assert fine[0].requires_grad and fine[0].is_leaf and fine[0]._version > version
    assert torch.equal(fine[0][:2], torch.ones(2, 6, device=device))


def test_opcheck(device):
    fine, coarse = stacks(4, ODD, torch.float32, device), stacks(2, ODD, torch.float32, device)
    shadow = [f.bfloat16() for f in fine]
    for chosen in ([], shadow):
        library.opcheck(torch.ops.mlpint.average_, (fine, coarse, 0, 2, 0.25, chosen))


def test_compile(device):
    fine, coarse = stacks(4, [(6,)], torch.float32, device), stacks(2, [(6,)], torch.float32, device)
    other = [f.clone() for f in fine]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(fine, coarse):
        return average.average_(fine, coarse, slice(1, None, 2), 0.25).sum()

    assert torch.equal(run(fine, coarse), average.average_(other, coarse, slice(1, None, 2), 0.25).sum())
    assert torch.equal(fine[0], other[0])


def test_errors(device):
    fine, coarse = stacks(4, [(6, 2)], torch.float32, device), stacks(2, [(6, 2)], torch.float32, device)
    for arguments, message in [
        ((fine, coarse, slice(None), 0.5), r"coarse\[0\] has shape \(2, 6, 2\), expected \(4, 6, 2\)"),
        ((fine, coarse + coarse, slice(0, 2), 0.5), "coarse has 2 tensors, fine has 1"),
        ((fine, coarse, slice(0, 2), 0.5, [fine[0][:2]]), r"shadow\[0\] has shape \(2, 6, 2\), expected \(4, 6, 2\)"),
        (
            ([fine[0].mT], [coarse[0].mT], slice(0, 2), 0.5),
            r"fine\[0\] has strides \(12, 1, 2\), expected dense layers",
        ),
        ((fine * 2, [coarse[0], coarse[0].double()], slice(0, 2), 0.5), r"coarse\[1\] is torch.float64"),
        ((fine, coarse, slice(None, None, -1), 0.5), "layers has step -1"),
        (([], [], slice(None), 0.5), "fine is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            average.average_(*arguments)
