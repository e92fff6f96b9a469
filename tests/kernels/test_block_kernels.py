"""A stack whose operations are the kernels, against the same in plain PyTorch."""

import pytest
import torch

from mlpint import MGRIT, LayerParallel
from mlpint.kernels.dispatch import Choice, forced
from mlpint.nn import BlockStack

OPERATIONS = ("ln_linear", "linear_axpy", "mlp", "attention", "attention_backward", "ln_backward_add")
KERNELS = {op: Choice("triton", None, "forced") for op in OPERATIONS}


@pytest.mark.parametrize(("attention", "padded", "h"), [("causal", False, 1.0), ("full", True, 0.5)])
def test_a_stack_of_kernels(device, attention, padded, h, monkeypatch):
    """Batched and one by one, forward only and with its backward, from strided views of the parameters."""
    from mlpint.kernels import attention as attention_module
    from mlpint.kernels import attention_backward as backward_module
    from mlpint.kernels import linear_axpy, ln_backward, ln_linear, mlp

    taken = set()
    modules = (ln_linear, "ln_linear"), (ln_linear, "ln_linear_train"), (linear_axpy, "linear_axpy"), (mlp, "mlp")
    modules += (attention_module, "attention"), (attention_module, "attention_train")
    modules += (backward_module, "attention_backward_packed"), (ln_backward, "ln_backward_add")

    def noted(name, original):
        return lambda *args: (taken.add(name), original(*args))[1]

    for module, name in modules:
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))

    torch.manual_seed(0)
    stack = BlockStack(6, 32, 2, ffn=48, attention=attention).to(device)
    for p in stack.parameters():
        torch.nn.init.normal_(p, std=0.15)
    x = torch.randn(2, 10, 32, device=device)
    lengths = torch.tensor([10, 7], device=device) if padded else None
    results = []
    for choices in ({}, KERNELS):
        network = LayerParallel(stack, MGRIT(cfactor=2, forward_iters=2, backward_iters=1), step_size=h)
        leaf = x.clone().requires_grad_()
        with forced(choices):
            y = network(leaf, lengths=lengths)
            y.square().sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad for p in network.stacked.parameters())))
        assert taken == (set() if not choices else {name for _, name in modules}), taken
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
