"""Transformer blocks written down from their formulas, for comparison with mlpint.nn: nothing of it is used here."""

import math

import torch

FORMS = {"tanh": lambda t: 0.5 * t * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)))}
FORMS["relu"] = lambda t: t * (t > 0)
FORMS["none"] = lambda t: 0.5 * t * (1 + torch.erf(t / math.sqrt(2)))


def normalized(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def attend(qkv, heads, causal, lengths):
    batch, sequence, width = qkv.shape
    size = width // 3 // heads
    rows = []
    for b in range(batch):
        length = sequence if lengths is None else int(lengths[b])
        q, k, v = qkv[b].view(sequence, 3, heads, size).unbind(1)  # [T, H, hd]
        places = []
        for t in range(sequence):
            seen = min(t + 1, length) if causal else length
            if t >= length:
                places.append(torch.zeros(heads * size, dtype=qkv.dtype))
                continue
            scores = torch.einsum("hc,shc->hs", q[t], k[:seen]) / math.sqrt(size)
            share = scores.exp() / scores.exp().sum(1, keepdim=True)
            places.append(torch.einsum("hs,shc->hc", share, v[:seen]).flatten())
        rows.append(torch.stack(places))
    return torch.stack(rows)


def remember(q, kv, heads, lengths):
    """Attention of every query to all of a memory but its padding."""
    size = q.shape[2] // heads
    rows = []
    for b in range(len(q)):
        length = kv.shape[1] if lengths is None else int(lengths[b])
        if length == 0:
            rows.append(torch.zeros_like(q[b]))
            continue
        k, v = kv[b, :length].view(length, 2, heads, size).unbind(1)
        scores = torch.einsum("thc,shc->ths", q[b].view(-1, heads, size), k) / math.sqrt(size)
        share = scores.exp() / scores.exp().sum(2, keepdim=True)
        rows.append(torch.einsum("ths,shc->thc", share, v).flatten(1))
    return torch.stack(rows)


def step(
    p, x, *, heads, attention="causal", norm="pre", gelu="tanh", eps=1e-5, h=1.0, lengths=None, memory=None,
    memory_lengths=None,
):  # fmt: skip
    """p: parameters by their names in a block ("ln1.weight", ...)."""

    def ln(n, t):
        return normalized(t, p[f"ln{n}.weight"], p[f"ln{n}.bias"], eps)

    def linear(name, t):
        return t @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def attended(t):
        return linear("proj", attend(linear("qkv", t), heads, attention == "causal", lengths))

    def ffn(t):
        return linear("down", FORMS[gelu](linear("up", t)))

    if norm == "pre":
        y = x + attended(ln(1, x))
        if memory is not None:
            q, kv = linear("cross_q", ln("_cross", y)), linear("cross_kv", ln("_memory", memory))
            y = y + linear("cross_proj", remember(q, kv, heads, memory_lengths))
        return x + h * (y - x + ffn(ln(2, y)))
    y = ln(1, x + attended(x))
    return x + h * (ln(2, y + ffn(y)) - x)
