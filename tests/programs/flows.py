"""What others do with a model after parallelize: clipping, accelerate, Trainer, PEFT. On any number of ranks."""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from runner import run
from torch import nn
from torch.nn.utils import clip_grad_norm_  # held by its own name, as many scripts do
from transformers import LlamaConfig, LlamaForCausalLM

from mlpint import MGRIT, LayerParallel, check_replicas
from mlpint.hf import parallelize

transformers.logging.set_verbosity_error()
EXACT = MGRIT(levels=1)
IDS = torch.randint(2, 30, (3, 6), generator=torch.Generator().manual_seed(1))


def llama(layers=4):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30, num_key_value_heads=1, tie_word_embeddings=False))


def pair(options=EXACT, comm=None, **more):
    reference = llama(**more)
    return reference, parallelize(copy.deepcopy(reference), options, comm=comm)


def backward(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach()


def assert_gradients(model, reference, tolerance=1e-5):
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def clipped_by_torch(comm):
    reference, model = pair(comm=comm)
    for clip in torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad.clip_grad_norm_, clip_grad_norm_:
        norms = []
        for each in reference, model:
            backward(each)
            norms.append(float(clip(each.parameters(), 0.1)))
        assert norms[0] > 0.1 and abs(norms[1] / norms[0] - 1) < 1e-5, norms
        assert_gradients(model, reference)
    for of_norms in True, False:  # some of the parameters, twice in a pass
        norms = []
        for each in reference, model:
            backward(each)
            some = [p for name, p in each.named_parameters() if ("norm" in name) == of_norms]
            norms += [float(clip_grad_norm_(some, 0.1)), float(torch.nn.utils.get_total_norm([p.grad for p in some]))]
        assert abs(norms[2] / norms[0] - 1) < 1e-5 and abs(norms[3] / norms[1] - 1) < 1e-5, norms
        assert_gradients(model, reference)
    if comm.size > 1:
        _raises(ValueError, "norm_type=2", lambda: clip_grad_norm_(model.parameters(), 1.0, norm_type=1))
    assert check_replicas(model) == []


def clipped_with_frozen_layers(comm):
    """A rank whose layers are all frozen, and one without layers, take part in the norm."""
    for layers, cfactor in ((6, 2), (2, 2)):
        options = EXACT if layers > 2 else MGRIT(cfactor=cfactor, forward_iters=1, backward_iters=1)
        reference, model = pair(options, comm, layers=layers)
        norms = []
        for each in reference, model:
            for name, parameter in each.named_parameters():
                parameter.requires_grad_("layers.0." not in name and "layers.1." not in name or layers == 2)
            for _ in range(2):
                backward(each)
                trainable = [p for p in each.parameters() if p.requires_grad]
                norms.append(float(clip_grad_norm_(trainable, 0.1)))
        assert all(abs(a / b - 1) < 1e-5 for a, b in zip(norms[:2], norms[2:], strict=True)), norms
        assert_gradients(model, reference)


def other_models_are_clipped_alone(comm):
    """One rank clips a model of its own between two passes; nobody else has to be there."""
    _, model = pair(comm=comm)
    backward(model)
    clip_grad_norm_(model.parameters(), 1.0)
    if comm.rank == 0:
        other = nn.Linear(2, 2)
        other(torch.ones(1, 2)).sum().backward()
        assert float(clip_grad_norm_(other.parameters(), 1e9)) == float(torch.tensor(6.0).sqrt())
    torch.manual_seed(1)
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    stack = LayerParallel(copy.deepcopy(layers), EXACT, comm=comm)
    copied = copy.deepcopy(stack)
    x = torch.ones(1, 2)
    for layer in layers:
        x = layer(x)
    x.sum().backward()
    copied(torch.ones(1, 2)).sum().backward()
    expected, got = clip_grad_norm_(layers.parameters(), 0.1), clip_grad_norm_(copied.parameters(), 0.1)
    assert abs(float(got / expected) - 1) < 1e-5


def _raises(kind, word, action):
    try:
        action()
    except kind as error:
        assert word in str(error), error
    else:
        raise AssertionError(f"no error with {word!r}")


if __name__ == "__main__":
    run([clipped_by_torch, clipped_with_frozen_layers, other_models_are_clipped_alone])
