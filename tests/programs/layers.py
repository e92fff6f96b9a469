"""Small layers and the serial reference that the scenarios share."""

import torch
from torch import nn


class Residual(nn.Module):
    """x + c W tanh(V x)."""

    def __init__(self, dim=4, scale=0.3):
        super().__init__()
        self.inner, self.outer, self.scale = nn.Linear(dim, dim), nn.Linear(dim, dim), scale

    def forward(self, x):
        return x + self.scale * self.outer(torch.tanh(self.inner(x)))


class Attention(nn.Module):
    """A transformer block with mask, dropout and a bias that arrives as an argument."""

    def __init__(self, dim=8, heads=2, dropout=0.0, as_tuple=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.up, self.down, self.dropout = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.Dropout(dropout)
        self.as_tuple = as_tuple

    def forward(self, x, attention_mask=None, bias=None):
        z = self.norm1(x)
        if bias is not None:
            z = z + bias
        x = x + self.dropout(self.attention(z, z, z, attn_mask=attention_mask, need_weights=False)[0])
        x = x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm2(x)))))
        return (x, None) if self.as_tuple else x


def plain(layers, x, *args, **kwargs):
    """The loop that a stack replaces."""
    for layer in layers:
        out = layer(x, *args, **kwargs)
        x = out[0] if isinstance(out, tuple) and isinstance(x, torch.Tensor) else out
    return x


def copies(layers):
    """Independent copies, for the reference; what the layers share stays shared."""
    import copy

    return copy.deepcopy(list(layers))


def assert_close(a, b, tolerance=1e-12, what=""):
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} against {tuple(b.shape)}"
    error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30) if a.numel() else 0.0
    assert error <= tolerance, f"{what}: relative error {error:.3g} over {tolerance:.3g}"


def assert_gradients_equal(stack, reference, tolerance=1e-12):
    """Own layers of a stack against the reference's layers of the same index."""
    for n, layer in stack.local_layers.items():
        theirs = dict(reference[n].named_parameters())
        for name, parameter in layer.named_parameters():
            expected = theirs[name].grad
            what = f"gradient of layer {n}, {name}"
            if expected is None or parameter.grad is None:
                assert (parameter.grad is None or not parameter.grad.any()) and (
                    expected is None or not expected.any()
                ), f"{what}: {parameter.grad} against {expected}"
            else:
                assert_close(parameter.grad, expected, tolerance, what)
