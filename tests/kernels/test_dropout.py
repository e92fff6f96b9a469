"""Dropout's kernel: Philox against the published numbers, masks against plain PyTorch, a product and a step."""

import pytest
import torch
from torch import library

from mlpint.kernels.dispatch import Choice, forced
from mlpint.kernels.dropout import drop, drop_step, dropout_mask, mask_reference, philox_reference
from mlpint.nn import dropout as places
from mlpint.nn.dropout import Dropout

SEEDS, LEVELS = [7, -(2**62), 2**63 - 1], 20000


def seeds_on(device):
    return torch.tensor(SEEDS, device=device)


def test_philox_is_the_published_one():
    """Of Random123's known answers those that a counter of 64 bits reaches."""
    zero = torch.zeros(1, dtype=torch.int64)
    found = [int(word) for word in philox_reference(0, zero)]
    assert found == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize(("rows", "columns"), [(5, 20), (3, 8), (40, 1), (2, 1030)])
def test_masks(device, rows, columns):
    seeds = seeds_on(device)
    expected = mask_reference(seeds, 3, rows, columns, LEVELS)
    assert 0 < expected.count_nonzero() < expected.numel()
    found = dropout_mask(seeds, 3, rows, columns, LEVELS, torch.float32)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=0)
    assert not torch.equal(found, dropout_mask(seeds, 2, rows, columns, LEVELS, torch.float32))
    assert torch.equal(found[1:2], dropout_mask(seeds[1:2], 3, rows, columns, LEVELS, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_and_a_step(device, dtype):
    seeds = seeds_on(device)
    update, y = (torch.randn(3, 6, 20, device=device).to(dtype) for _ in range(2))
    x = torch.randn(6, 6, 20, device=device).to(dtype)[::2]  # layers with others between
    mask = mask_reference(seeds, 1, 6, 20, LEVELS).to(device)
    tolerance = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-5}
    dropped = mask * update.double()
    torch.testing.assert_close(drop(update, seeds, 1, LEVELS).double(), dropped, **tolerance)
    for h in 1.0, 0.3:
        expected = x.double() + h * (y.double() - x.double() + dropped)
        torch.testing.assert_close(drop_step(update, y, x, seeds, 1, LEVELS, h).double(), expected, **tolerance)
    narrow = update.to(torch.bfloat16)
    assert drop_step(narrow, y, x, seeds, 1, LEVELS, 1.0).dtype == dtype
    library.opcheck(torch.ops.mlpint.drop.default, (update, seeds, 1, LEVELS))
    library.opcheck(torch.ops.mlpint.drop_step.default, (update, y, x, seeds, 1, LEVELS, 0.5))
    library.opcheck(torch.ops.mlpint.dropout_mask.default, (seeds, 1, 6, 20, LEVELS, dtype))


def test_bad_arguments_are_named(device):
    seeds, x = seeds_on(device), torch.randn(3, 2, 8, device=device)
    for call, words in (
        (lambda: drop(x, seeds[:2], 0, 5), "expected int64"),
        (lambda: drop(x, seeds.int(), 0, 5), "seeds is torch.int32"),
        (lambda: drop(x, seeds, 0, 1 << 16), "levels = 65536"),
        (lambda: drop(x[0], seeds, 0, 5), "expected .J, R, C."),
        (lambda: drop_step(x, x, x[:, :1], seeds, 0, 5, 1.0), "must be of one shape"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_all_ways_to_a_mask_agree(device):
    """What autograd follows, the product alone and the step, for keys of 64 bits without a sign."""
    own = Dropout((5, 2**64 - 3), places.FFN, 0.3)
    x = torch.randn(2, 3, 4, 10, device=device)
    with forced({"dropout": Choice("triton", None, "forced")}):
        factors = own.factors((3, 4, 10), x.dtype, x.device)
        kept = own(x)
        followed = own(x.clone().requires_grad_())
        step = own.step(x.flatten(1, 2), x.flatten(1, 2), x.flatten(1, 2), 1.0)
    assert followed.requires_grad and torch.equal(followed.detach(), x * factors)
    torch.testing.assert_close(kept, x * factors)
    torch.testing.assert_close(step, (x + x * factors).flatten(1, 2))
    assert 0 < factors.count_nonzero() < factors.numel()
