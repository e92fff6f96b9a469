"""What others do with a model after parallelize: clipping, accelerate, Trainer, PEFT. On any number of ranks."""

import copy
import json
import os
import shutil

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import peft
import torch
import transformers
from runner import raises, run, shared_folder
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import clip_grad_norm_  # held by its own name, as many scripts do
from transformers import LlamaConfig, LlamaForCausalLM

from mlpint import MGRIT, LayerParallel, check_replicas
from mlpint.errors import UserError
from mlpint.hf import TrainerMixin, parallelize, save_pretrained

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
        raises(ValueError, "norm_type=2", lambda: clip_grad_norm_(model.parameters(), 1.0, norm_type=1))
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


def compiled_whole(comm):
    """torch.compile of the model: its graphs break at the loop over the layers."""
    reference, model = pair(comm=comm)
    backward(reference)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(backward(compiled), backward(reference), rtol=1e-6, atol=0)
        assert_gradients(model, reference)


class Trainer(TrainerMixin, transformers.Trainer):
    pass


def _trainer(kind, model, folder, **more):
    ids = torch.randint(2, 30, (24, 6), generator=torch.Generator().manual_seed(3))
    options = {"max_steps": 6, "save_steps": 3, "logging_steps": 6, "per_device_train_batch_size": 4, "seed": 1}
    options |= {"learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options | more)
    return kind(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])


def trainer_saves_and_resumes(comm):
    """Trainer on all ranks, its checkpoint resumed on all: the parameters of a plain Trainer, its clipping included."""
    reference, model = (m.double() for m in pair(comm=comm))
    start = copy.deepcopy(reference)
    with shared_folder(comm) as folder:
        _trainer(transformers.Trainer, reference, folder / f"plain-{comm.rank}", save_strategy="no").train()
        trainer = _trainer(Trainer, model, folder / "run")
        trainer.train()
        expected = reference.state_dict()
        torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=1e-10)
        checkpoint = folder / "run" / "checkpoint-3"
        again = parallelize(start, EXACT, comm=comm)
        _trainer(Trainer, again, folder / "run").train(resume_from_checkpoint=str(checkpoint))
        torch.testing.assert_close(dict(again.state_dict()), dict(expected), rtol=0, atol=1e-10)
        saved = LlamaForCausalLM.from_pretrained(folder / "run" / "checkpoint-6", dtype=torch.float64)
        torch.testing.assert_close(saved.state_dict(), expected, rtol=0, atol=1e-10)
        if comm.size == 1:
            return
        shutil.rmtree(checkpoint / "mlpint") if comm.rank == 0 else None
        comm.barrier()
        other = _trainer(Trainer, again, folder / "run")
        raises(UserError, "lacks mlpint/", lambda: other.train(resume_from_checkpoint=str(checkpoint)))
        push = {"push_to_hub": True, "hub_token": "none"}
        raises(UserError, "push_to_hub", lambda: _trainer(Trainer, again, folder / "run", **push))
        # Trainer alone has all ranks write one optimizer.pt; whose it is in the end is chance, so exchange them here.
        optimizer = trainer.optimizer.optimizer
        torch.save(optimizer.state_dict(), folder / f"{comm.rank}.pt")
        comm.barrier()
        foreign = torch.load(folder / f"{(comm.rank + 1) % comm.size}.pt")
        raises(RuntimeError, "TrainerMixin", lambda: optimizer.load_state_dict(foreign))
        optimizer.load_state_dict(torch.load(folder / f"{comm.rank}.pt"))


def trainer_of_stacked_layers(comm):
    """The parameters of a plain Trainer, weight decay and clipping included; resumed from its own checkpoint."""
    reference, start = (m.double() for m in (llama(), llama()))
    start.load_state_dict(reference.state_dict())
    stacked = [parallelize(copy.deepcopy(start), EXACT, comm=comm, stacked=True) for _ in range(2)]
    close = {"rtol": 0, "atol": 1e-4}  # of six steps of 1e-2; the library has RMSNorms in single precision
    with shared_folder(comm) as folder:
        more = {"weight_decay": 3.0, "optim_args": "eps=1e-4"}
        _trainer(transformers.Trainer, reference, folder / f"plain-{comm.rank}", save_strategy="no", **more).train()
        _trainer(Trainer, stacked[0], folder / "run", **more).train()
        torch.testing.assert_close(dict(stacked[0].state_dict()), dict(reference.state_dict()), **close)
        checkpoint = folder / "run" / "checkpoint-3"
        _trainer(Trainer, stacked[1], folder / "run", **more).train(resume_from_checkpoint=str(checkpoint))
        torch.testing.assert_close(dict(stacked[1].state_dict()), dict(reference.state_dict()), **close)


def adapters_are_saved_whole(comm):
    """PEFT before parallelize: the saved adapters are those of all ranks, and plain PEFT loads them."""
    torch.manual_seed(4)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    reference = peft.get_peft_model(llama(), settings)
    model = parallelize(copy.deepcopy(reference), EXACT, comm=comm)
    for each in reference, model:
        backward(each)
    assert_gradients(model, reference)
    with shared_folder(comm) as folder:
        save_pretrained(model, folder / "adapters")
        saved = load_file(folder / "adapters" / "adapter_model.safetensors")
        torch.testing.assert_close(saved, peft.get_peft_model_state_dict(reference), rtol=0, atol=0)
        loaded = peft.PeftModel.from_pretrained(llama(), folder / "adapters")
        with torch.no_grad():
            loss, expected = (m(input_ids=IDS, labels=IDS).loss for m in (loaded, reference))
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        if comm.size > 1:
            raises(RuntimeError, "mlpint.hf.save_pretrained", lambda: model.save_pretrained(folder / "other"))
            raises(RuntimeError, "mlpint.hf.save_pretrained", lambda: peft.get_peft_model_state_dict(model))
        plain = parallelize(llama(), EXACT, comm=comm)
        save_pretrained(plain, folder / "whole")
        state = LlamaForCausalLM.from_pretrained(folder / "whole").state_dict()
        torch.testing.assert_close(state, llama().state_dict(), rtol=0, atol=0)


def _t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 3, "num_decoder_layers": 4}
    return transformers.T5Config(**sizes, vocab_size=30, decoder_start_token_id=0, dropout_rate=0.0)


def _gpt2():
    sizes = {"n_layer": 5, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 30}
    return transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=1)


KINDS = [
    (transformers.GPT2LMHeadModel, _gpt2(), ["transformer.h"]),  # with a tied head
    (LlamaForCausalLM, llama().config, ["model.layers"]),  # with buffers that are in no file
    (transformers.T5ForConditionalGeneration, _t5(), ["encoder.block", "decoder.block"]),
]


def files_are_read_by_those_who_need_them(comm):
    """Several files, of which a rank reads its own layers' and the edges'."""
    for kind, config, paths in KINDS:
        torch.manual_seed(4)
        reference = kind(config).eval()
        with shared_folder(comm) as folder:
            if comm.rank == 0:
                reference.save_pretrained(folder, max_shard_size="20KB")
            comm.barrier()
            model = parallelize(kind, folder, EXACT, comm=comm)
            elsewhere = [n for n, p in model.named_parameters() if p.is_meta]
            assert not elsewhere and not model.training, elsewhere
            assert all(isinstance(model.get_submodule(path), LayerParallel) for path in paths)
            assert_same(model, reference)
            for each in (model, reference):
                backward(each)
            assert_gradients(model, reference)
            state = model.state_dict()
            assert all(torch.equal(t, state[name]) for name, t in reference.state_dict().items())

            index = folder / "model.safetensors.index.json"
            if comm.rank == 0:
                listed = json.loads(index.read_text())
                taken = next(name for name in listed["weight_map"] if name.startswith(f"{paths[0]}.1."))
                file = folder / listed["weight_map"].pop(taken)
                index.write_text(json.dumps(listed))
                save_file({n: t for n, t in load_file(file).items() if n != taken}, file, metadata={"format": "pt"})
            comm.barrier()
            raises(UserError, "lacks weights of layers", lambda: parallelize(kind, folder, EXACT, comm=comm))  # noqa: B023


def weights_are_drawn_for_any_number_of_ranks(comm):
    for kind, config, paths in KINDS:
        models = []
        for ranks in (comm, comm.data):  # of which the latter is this rank alone
            torch.manual_seed(4)
            models.append(parallelize(kind, config, EXACT, comm=ranks))
        ours, theirs = (model.state_dict() for model in models)
        unlike = [name for name in {**ours, **theirs} if not torch.equal(ours[name], theirs[name])]
        assert not unlike, (kind, unlike)
        first, second = (ours[f"{paths[0]}.{n}.{_matrix(ours, paths[0])}"] for n in (0, 1))
        assert not torch.equal(first, second)
        assert models[0].training and not any(p.is_meta for p in models[0].parameters())
        torch.manual_seed(5)
        plain = kind(config).state_dict()
        for name, tensor in ours.items():  # as transformers draws them
            assert tensor.shape == plain[name].shape and tensor.dtype == plain[name].dtype
            spread, expected = tensor.std(), plain[name].std()
            close = (
                abs(spread - expected) <= 0.35 * expected if tensor.numel() > 200 else (spread > 0) == (expected > 0)
            )
            assert close, (name, spread, expected)
        assert_same(*(model.eval() for model in models))
    raises(TypeError, "LayerFactory", lambda: parallelize(nn.Linear, config, comm=comm))
    raises(TypeError, "needs a configuration", lambda: parallelize(kind, comm=comm))


def _matrix(state, path):
    return next(n for n, t in state.items() if n.startswith(f"{path}.0.") and t.dim() == 2).removeprefix(f"{path}.0.")


def assert_same(model, reference):
    with torch.no_grad():
        outputs = [m(input_ids=IDS, labels=IDS) for m in (model, reference)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    run(
        [
            clipped_by_torch,
            clipped_with_frozen_layers,
            other_models_are_clipped_alone,
            compiled_whole,
            trainer_saves_and_resumes,
            trainer_of_stacked_layers,
            adapters_are_saved_whole,
            files_are_read_by_those_who_need_them,
            weights_are_drawn_for_any_number_of_ranks,
        ]
    )
