"""The learnt coarse step by itself: products in the layers' precision. What it learns on ranks: programs/solver.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlpint.mgrit.learnt_operator import LearntOperator
from mlpint.state import State


class Products(TorchDispatchMode):
    """Notes the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in str(function):
            self.dtypes.append(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("affine", [True, False])
def test_products_are_taken_in_the_precision_of_the_layers(affine):
    torch.manual_seed(0)
    operator, matrix = LearntOperator("fitted", affine), torch.randn(6, 6)
    u = State([torch.randn(40, 6)])
    for _ in range(6):
        v = State([u.tensors[0] + torch.randn(40, 6)])
        end = State([u.tensors[0] + (v.tensors[0] - u.tensors[0]) @ matrix])
        operator.observe(0, 4, u, v, end)
    exact = operator.step(0, 4, u, v).tensors[0], operator.pullback(0, 4, v).tensors[0]
    torch.testing.assert_close(exact[0], end.tensors[0], rtol=0.02, atol=0.02)
    for precision, expected in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32),
        (None, torch.float32),
    ):
        operator.precision = precision
        with Products() as products, torch.autocast("cpu", dtype=torch.float16):
            found = operator.step(0, 4, u, v).tensors[0], operator.pullback(0, 4, v).tensors[0]
        assert products.dtypes == [expected] * 2
        for a, b in zip(found, exact, strict=True):
            assert a.dtype == torch.float32
            tolerance = 0.02 if expected == torch.bfloat16 else 0.0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
