"""parallelize() on plain torch models, and the replicas of what lies outside the stack, on any number of ranks."""

import copy
import gc
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from compare import check, compare, converged, disturb, float64, names_everywhere
from layers import Attention, Residual, assert_close
from runner import run
from torch import nn
from torch.nn import functional as F

from mlpint import MGRIT
from mlpint.hf import parallelize
from mlpint.nn import BlockStack
from mlpint.nn.stack import named_rows
from mlpint.parallel.replicas import check_replicas, sync_replicas, tensors_outside


class Language(nn.Module):
    """Embedding, blocks, tied head; ``way`` says how the forward runs through its blocks."""

    def __init__(self, way="loop", layers=6, dim=16, dropout=0.0, vocabulary=20):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(vocabulary, dim), nn.Dropout(dropout)
        blocks = [Attention(dim, as_tuple=way == "tuple") for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks) if way == "sequential" else nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(1.5))
        self.way, self.count = way, layers

    def forward(self, tokens):
        x = self.dropout(self.scale * self.embedding(tokens))
        t = tokens.shape[1]
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        if self.way == "sequential":
            x = self.blocks(x)
        elif self.way == "tuple":
            for block in self.blocks:
                x, nothing = block(x, mask)
                assert nothing is None
        elif self.way == "keywords":
            for _, block in enumerate(self.blocks[: self.count]):
                x = block(attention_mask=mask, x=x)
        else:
            for block in self.blocks:
                x = block(x, attention_mask=mask)
        return self.head(self.norm(x))


def tokens(batch=3, length=5, vocabulary=20):
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def loss_of(ids):
    def call(model):
        logits = model(ids)
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), ids.flatten())}

    return call


@float64
def loops(comm):
    for way in ("loop", "tuple", "keywords", "sequential"):
        compare(comm, Language(way), loss_of(tokens()), layers=6)


@float64
def layer_parallel_options(comm):
    exact = MGRIT(levels=1)
    more = {"open_layers": 1, "close_layers": 2, "recompute": True}
    model = compare(comm, Language(), loss_of(tokens()), options=[exact], **more)
    assert (model.blocks.layout.open_layers, model.blocks.layout.close_layers) == (1, 2)
    assert model.blocks.conditions.recompute


class Stacked(nn.Module):
    """Calls a BlockStack."""

    def __init__(self):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(20, 12), BlockStack(6, 12, 2, attention="full")

    def forward(self, tokens, lengths=None):
        return self.blocks(self.embedding(tokens), lengths)


@float64
def a_block_stack(comm):
    lengths = torch.tensor([5, 3, 4])
    for options in MGRIT(levels=1), converged(6):
        reference = Stacked()
        with torch.no_grad():
            for p in reference.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        model = parallelize(copy.deepcopy(reference), options, comm=comm)
        for each in reference, model:
            (each(tokens(), lengths) ** 3).sum().backward()
        assert_close(model(tokens(), lengths), reference(tokens(), lengths), 1e-10)
        rows = {name: (p.grad if row is None else row(p.grad)) for name, p, row in named_rows(reference)}
        own = {name: (p.grad if row is None else row(p.grad)) for name, p, row in named_rows(model)}
        assert len(own) == 1 + 12 * len(model.blocks.layout.local_indices(comm.rank))
        for name, gradient in own.items():
            scale = max(rows[name].abs().max(), 1e-4)  # those of the keys' biases are zero but for rounding
            assert (gradient - rows[name]).abs().max() < 1e-10 * scale, name
        state = model.state_dict()
        assert list(state) == list(reference.state_dict())
        reference.load_state_dict(state)


@float64
def idle_ranks_know_the_form(comm):
    """Fewer intervals than ranks: those without layers have seen none return a tuple."""
    model = compare(comm, Language("tuple", layers=3), loss_of(tokens()), options=[MGRIT(cfactor=3, forward_iters=1)])
    assert len(model.blocks.layout.idle_ranks) == comm.size - 1


@float64
def torch_encoder(comm):
    """nn.TransformerEncoder looks at its first layer before it loops, and makes nested tensors in eval mode."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4)
    x = torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    compare(comm, encoder, lambda m: {"y": m(x, src_key_padding_mask=padding)[~padding]}, layers=4)
    compare(comm, encoder, lambda m: {"y": m(x, mask=causal, is_causal=True)}, layers=4)
    with torch.no_grad():
        encoder.eval()
        compare(comm, encoder, lambda m: {"y": m(x, src_key_padding_mask=padding)[~padding]}, layers=4)


@float64
def torch_transformer(comm):
    """Two stacks, one call for each; the decoder's gets the encoder's output as an argument with a gradient."""
    model = nn.Transformer(16, 2, 4, 4, 32, dropout=0.0, batch_first=True)
    source, target = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    reference = copy.deepcopy(model)
    disturb(model, comm)
    parallelize(model, converged(4), comm=comm, stack="encoder.layers")
    parallelize(model, converged(4), comm=comm, stack="decoder.layers")
    check(comm, reference, model, lambda m: {"y": m(source, target)})


def two_names_for_one_list(comm):
    model = Language()
    model.layers = model.blocks
    reference = copy.deepcopy(model)
    parallelize(model, MGRIT(levels=1), comm=comm)
    assert model.layers is model.blocks
    assert_close(model(tokens()), reference(tokens()), 1e-6)
    reference.load_state_dict(model.state_dict())
    model.load_state_dict(reference.state_dict())


def only_own_layers_are_kept(comm):
    model = Language()
    watched = [weakref.ref(p) for p in model.blocks.parameters()]
    owners = [n for n, block in enumerate(model.blocks) for _ in block.parameters()]
    parallelize(model, MGRIT(cfactor=2), comm=comm)
    gc.collect()
    own = model.blocks.local_layers
    assert [r() is not None for r in watched] == [n in own for n in owners]


def deepcopies(comm):
    """A copy of a replaced model is on its own: it notes the form of its own layers."""
    model = parallelize(Language("tuple"), MGRIT(levels=1), comm=comm)
    clone = copy.deepcopy(model)
    del model
    before = clone(tokens())
    assert torch.equal(clone(tokens()), before)


def same_random_numbers(comm):
    """Dropout outside the stack draws the same everywhere, whatever seeds the ranks came with."""
    torch.manual_seed(100 + comm.rank)
    model = parallelize(Language(dropout=0.5), MGRIT(cfactor=2), comm=comm)
    drawn = comm.gather(torch.rand(4).numpy().tobytes())
    assert len(set(drawn)) == 1
    model(tokens()).sum().backward()
    gradients = comm.gather(model.embedding.weight.grad.numpy().tobytes())
    assert len(set(gradients)) == 1


def differences_are_found_and_mended(comm):
    model = Language()
    model.blocks = nn.ModuleList([Residual(4)] * 8)  # one module, and so one set of parameters, for all layers
    disturb(model, comm)
    if comm.rank == comm.size - 1:
        with torch.no_grad():
            model.blocks[0].inner.bias += 1  # shared by layers of all ranks: set right by parallelize
    parallelize(model, MGRIT(cfactor=2), comm=comm)
    assert check_replicas(model) == []
    if comm.rank == comm.size - 1:
        with torch.no_grad():
            weight = model.embedding.weight
            weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(math.inf))  # a difference of one bit
            model.scale += 1
            next(iter(model.blocks.local_layers.values())).outer.weight[1, 1] += 1e-6
    differing = check_replicas(model, comm, raises=False)
    planted = ["embedding.weight", "scale", "blocks.0.outer.weight"] if comm.size > 1 else []
    assert sorted(differing) == sorted(planted), differing
    with pytest.raises(RuntimeError, match=r"copies differ in .*sync_replicas") if planted else nullcontext():
        check_replicas(model)
    sync_replicas(model)
    assert check_replicas(model) == []
    other = tensors_outside(model)
    assert set(other) == {"embedding.weight", "norm.weight", "norm.bias", "scale"}, other


def state_dicts(comm):
    model = Language()
    reference = copy.deepcopy(model)
    parallelize(model, MGRIT(cfactor=2), comm=comm)
    state = model.state_dict()
    assert list(state) == list(reference.state_dict())
    for name, value in reference.state_dict().items():
        assert torch.equal(state[name], value), name
    empty = Language()
    empty.load_state_dict(state)
    changed = {name: 1.1 * value for name, value in reference.state_dict().items()}
    reference.load_state_dict(changed)
    model.load_state_dict(changed)
    assert names_everywhere(comm, model) == {name for name, _ in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(name)), name


if __name__ == "__main__":
    run(
        [
            loops,
            layer_parallel_options,
            a_block_stack,
            idle_ranks_know_the_form,
            torch_encoder,
            torch_transformer,
            two_names_for_one_list,
            only_own_layers_are_kept,
            deepcopies,
            same_random_numbers,
            differences_are_found_and_mended,
            state_dicts,
        ]
    )
