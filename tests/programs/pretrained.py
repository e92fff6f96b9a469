"""parallelize() on models of the transformers library, built from configurations, on any number of ranks."""

import copy
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from compare import check, compare, converged, float64
from layers import assert_close
from runner import raises, run, shared_folder
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LongT5Config,
    LongT5ForConditionalGeneration,
    MarianConfig,
    MarianModel,
    MarianMTModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import mlpint
from mlpint import MGRIT
from mlpint.hf import parallelize
from mlpint.parallel.replicas import check_replicas

transformers.logging.set_verbosity_error()
IDS = torch.randint(2, 30, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
BOTH = [None, MASK]


def gpt2(kind=GPT2LMHeadModel, layers=6, dropout=0.0, **more):
    sizes = {"n_layer": layers, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 30}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return kind(GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=1, pad_token_id=0, **more))


def bert(kind, layers=5):
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    drop = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return kind(BertConfig(**sizes, **drop, vocab_size=30, max_position_embeddings=16, num_labels=3))


def vit(kind, layers=4):
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=3))


def outputs(**arguments):
    """All that a model returns, and a loss in double precision (theirs is taken in single)."""

    def call(model):
        found = {name: value for name, value in model(**arguments).items() if isinstance(value, torch.Tensor)}
        assert (found.pop("loss", None) is not None) == ("labels" in arguments)
        if "labels" in arguments:
            found["loss"] = F.cross_entropy(found["logits"].flatten(0, -2), arguments["labels"].flatten())
        return found

    return call


@float64
def gpt2_models(comm):
    for mask in BOTH:
        compare(comm, gpt2(GPT2Model), outputs(input_ids=IDS, attention_mask=mask), layers=6)
        model = compare(comm, gpt2(), outputs(input_ids=IDS, attention_mask=mask, labels=IDS), layers=6)
        assert model.lm_head.weight is model.transformer.wte.weight


@float64
def gpt2_with_its_own_loss(comm):
    """The library's loss rounds to single precision; exact sweeps have the same bits to round."""

    def call(model):
        return {"loss": model(IDS, attention_mask=MASK, labels=IDS).loss}

    compare(comm, gpt2(), call, options=[MGRIT(levels=1)])


@float64
def gpt2_eager_attention(comm):
    model = gpt2(attn_implementation="eager", scale_attn_by_inverse_layer_idx=True)
    compare(comm, model, outputs(input_ids=IDS, attention_mask=MASK), layers=6)


@float64
def gpt2_generates(comm):
    def call(model):
        torch.manual_seed(5)
        rules = {"attention_mask": MASK, "max_new_tokens": 6, "use_cache": False}
        greedy = model.generate(IDS, do_sample=False, **rules)
        drawn = model.generate(IDS, do_sample=True, temperature=2.0, **rules)
        assert greedy.shape[1] > IDS.shape[1]
        return {"greedy": greedy, "drawn": drawn}

    model = gpt2().eval()
    with torch.no_grad():
        model.transformer.wte.weight *= 20  # else the likeliest token is the same for all prompts
        changed = compare(comm, model, call, layers=6)
        rules = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False}
        by_default = changed.generate(IDS, **rules)
        assert torch.equal(by_default, model.generate(IDS, **rules))  # this one with a cache
        assert len({tuple(row) for row in by_default[:, IDS.shape[1] :].tolist()}) > 1


@float64
def bert_models(comm):
    labels = torch.tensor([0, 2, 1])
    for mask in BOTH:
        compare(comm, bert(BertModel), outputs(input_ids=IDS, attention_mask=mask), layers=5)
        masked = outputs(input_ids=IDS, attention_mask=mask, labels=IDS, token_type_ids=IDS % 2)
        compare(comm, bert(BertForMaskedLM), masked, layers=5)
        classified = outputs(input_ids=IDS, attention_mask=mask, labels=labels)
        compare(comm, bert(BertForSequenceClassification), classified, layers=5)


@float64
def vit_models(comm):
    images = torch.randn(3, 1, 8, 8)
    compare(comm, vit(ViTModel), outputs(pixel_values=images), layers=4)
    labels = torch.tensor([0, 2, 1])
    compare(comm, vit(ViTForImageClassification), outputs(pixel_values=images, labels=labels), layers=4)


@float64
def llama(comm):
    """Not named anywhere in mlpint: any model with a plain loop will do."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30, num_key_value_heads=1))
    compare(comm, model, outputs(input_ids=IDS, attention_mask=MASK, labels=IDS), layers=4)


def marian(kind=MarianMTModel, layers=(4, 3)):
    sizes = {"d_model": 16, "encoder_layers": layers[0], "decoder_layers": layers[1], "vocab_size": 30}
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= heads | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32) | {"max_position_embeddings": 32}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    return kind(MarianConfig(**sizes, **tokens, dropout=0.0))


def t5(kind=T5ForConditionalGeneration, layers=(4, 3), config=T5Config, **more):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 30}
    sizes |= {"num_layers": layers[0], "num_decoder_layers": layers[1], "relative_attention_num_buckets": 8}
    sizes |= {"relative_attention_max_distance": 6, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    return kind(config(**sizes, **more))


@float64
def marian_models(comm):
    """Encoder and decoder, by one call for both or one for each."""
    labels = IDS.flip(1)
    for mask in BOTH:
        compare(comm, marian(), outputs(input_ids=IDS, attention_mask=mask, labels=labels), layers=4)
        inputs = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": labels}
        compare(comm, marian(MarianModel), outputs(**inputs), layers=4)
    reference = marian()
    model = copy.deepcopy(reference)
    for part in "encoder", "decoder":
        parallelize(model, converged(4), comm=comm, stack=f"model.{part}.layers")
    check(comm, reference, model, outputs(input_ids=IDS, attention_mask=MASK, labels=labels))


@float64
def t5_models(comm):
    labels = IDS.flip(1)
    for mask in BOTH:
        compare(comm, t5(), outputs(input_ids=IDS, attention_mask=mask, labels=labels), layers=4)
    compare(comm, t5(T5EncoderModel), outputs(input_ids=IDS, attention_mask=MASK), layers=4)
    masked, exact = outputs(input_ids=IDS, attention_mask=MASK, labels=labels), [MGRIT(levels=1)]
    compare(comm, t5(attn_implementation="eager"), masked, options=exact)
    compare(comm, t5(UMT5ForConditionalGeneration, config=UMT5Config), masked, options=exact)  # a bias for each layer
    batch_of_one = outputs(input_ids=IDS[:1], labels=labels[:1])
    compare(comm, t5(), batch_of_one, options=exact, serial_microbatches=2, recompute=True)


@float64
def t5_trains(comm):
    """The table of the position bias lies in layer 0 and has a replica everywhere: it counts once, and stays equal."""
    reference = t5()
    model = parallelize(copy.deepcopy(reference), converged(4), comm=comm)
    runs = [(reference, torch.nn.utils.clip_grad_norm_), (model, mlpint.clip_grad_norm_)]
    for _ in range(3):
        norms = []
        for each, clip in runs:
            each(input_ids=IDS, attention_mask=MASK, labels=IDS.flip(1)).loss.backward()
            norms.append(float(clip(each.parameters() if each is reference else each, 0.5)))
            with torch.no_grad():
                for p in each.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        assert norms[0] > 0.5 and abs(norms[1] / norms[0] - 1) < 1e-6, norms  # their loss is in single precision
    assert check_replicas(model) == []
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    state = model.state_dict()
    for key, value in reference.state_dict().items():
        assert_close(state[key], value, 1e-6, key)
    if comm.rank == comm.size - 1:
        with torch.no_grad():
            model.get_parameter(name)[2, 1] += 1e-6
    assert check_replicas(model, raises=False) == ([name] if comm.size > 1 else [])


@float64
def translations_are_generated(comm):
    def call(model):
        rules = {"attention_mask": MASK, "max_new_tokens": 5, "min_new_tokens": 5, "no_repeat_ngram_size": 1}
        greedy = model.generate(IDS, do_sample=False, use_cache=False, **rules)
        beams = model.generate(IDS, num_beams=3, **rules)  # theirs with a cache
        assert len({tuple(row) for row in greedy.tolist()}) > 1
        return {"greedy": greedy, "beams": beams}

    for make in marian, t5:
        model = make().eval()
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
            # Tied, the likeliest token would be the one before.
            model.lm_head.weight = torch.nn.Parameter(torch.randn(30, 16))
            compare(comm, model, call, layers=4)


@float64
def activation_checkpointing(comm):
    model = gpt2(dropout=0.2)
    changed = parallelize(model, MGRIT(cfactor=2), comm=comm)
    gradients = []
    for on in (False, True):
        if on:
            changed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        changed.zero_grad()
        changed.transformer.h.dropout_key(1)
        torch.manual_seed(2)
        changed(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in changed.parameters()])
    for without, with_it in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-10, atol=1e-14)


def dropout_outside_the_stack(comm):
    torch.manual_seed(comm.rank)
    model = parallelize(gpt2(dropout=0.3), MGRIT(cfactor=2), comm=comm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert check_replicas(model) == []


def refused(comm):
    """What is asked of the layers alone has an error on every rank, and the model stays usable."""
    model = parallelize(gpt2(), MGRIT(levels=1), comm=comm)
    cached = gpt2()(IDS, use_cache=True).past_key_values
    for arguments, word in [
        ({"use_cache": True}, "use_cache=False"),
        ({"past_key_values": cached}, "use_cache=False"),
        ({"output_hidden_states": True}, "output_hidden_states=False"),
        ({"output_attentions": True}, "output_attentions=False"),
    ]:
        raises(ValueError, word, lambda arguments=arguments: model(IDS, **arguments))
    raises(ValueError, "use_cache=False", lambda: model.generate(IDS, max_new_tokens=2, use_cache=True))
    model.config.output_hidden_states = True
    raises(ValueError, "output_hidden_states=False", lambda: model(IDS))
    model.config.output_hidden_states = False
    encoder = parallelize(bert(BertModel), MGRIT(levels=1), comm=comm)
    raises(ValueError, "output_attentions=False", lambda: encoder(IDS, output_attentions=True))
    assert encoder(IDS).attentions is None
    assert model(IDS).past_key_values is None


def other_stacks_are_refused(comm):
    """A part that is not there, and layers that hand each other more than T5's."""
    there = 'stack="decoder.block" (3 layers)'
    raises(ValueError, there, lambda: parallelize(t5(), comm=comm, stack="decoder.layers"))
    model = t5(LongT5ForConditionalGeneration, config=LongT5Config)
    raises(ValueError, "gives layer 1 value 1 that layer 0 returns", lambda: parallelize(model, comm=comm))
    assert isinstance(model.encoder.block, torch.nn.ModuleList)
    model = marian()
    raises(ValueError, "open_layers + close_layers", lambda: parallelize(model, comm=comm, open_layers=3))
    assert isinstance(model.model.encoder.layers, torch.nn.ModuleList)  # as it was, though this one has a layer left


def saved_and_loaded(comm):
    for make in gpt2, marian, t5:
        model = make()
        changed = parallelize(model, MGRIT(levels=1), comm=comm)
        state = changed.state_dict()  # on every rank
        if comm.rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                changed.save_pretrained(folder, state_dict=dict(state))  # which it changes
                loaded = type(model).from_pretrained(folder)
            for name, value in loaded.state_dict().items():
                assert torch.equal(value, state[name]), name
        comm.barrier()


MODERN = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
MODERN |= {"intermediate_size": 32, "vocab_size": 30, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
SINGLE = 2e-5  # the library has RMSNorms and positions in single precision
HEADS_OF_8 = {"head_dim": 8}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}


@float64
def stacked_models(comm):
    """Layers that become a BlockStack: outputs, gradients and state dicts are the model's, also of padded batches."""
    for mask in BOTH:
        for kind, more in [
            ("Llama", {}),
            ("Mistral", {"sliding_window": 3}),
            ("Qwen2", WINDOWS),
            ("Qwen3", HEADS_OF_8),
            ("Olmo2", {"attn_implementation": "eager"}),
            ("Gemma", HEADS_OF_8),
            ("Gemma2", HEADS_OF_8 | {"attn_logit_softcapping": None, "sliding_window": 3}),
        ]:
            if mask is None and kind not in ("Llama", "Qwen2", "Gemma2"):
                continue
            config = getattr(transformers, f"{kind}Config")(**MODERN, **more)
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            # In double precision the library's eager attention makes NaNs of padding on the left.
            seen = (
                mask
                if mask is None or model.config._attn_implementation != "eager"
                else mask.sort(1, descending=True)[0]
            )
            call = outputs(input_ids=IDS, attention_mask=seen, labels=IDS)
            options = [MGRIT(levels=1)] if mask is None else [converged(4)]
            compare(comm, model, call, options=options, stacked=True, tolerance=SINGLE)
        compare(comm, gpt2(GPT2Model), outputs(input_ids=IDS, attention_mask=mask), layers=6, stacked=True)
        compare(comm, bert(BertModel), outputs(input_ids=IDS, attention_mask=mask), layers=5, stacked=True)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2], [3, 4, 5, 6, 7, 8], [*range(6)]])  # two texts in the first row
    turned = outputs(input_ids=IDS, position_ids=packed, use_cache=False)
    compare(comm, transformers.LlamaModel(LlamaConfig(**MODERN)), turned, layers=4, stacked=True, tolerance=SINGLE)
    slices = {"stacked": True, "serial_microbatches": 3, "recompute": True}
    compare(comm, gpt2(GPT2Model), outputs(input_ids=IDS, attention_mask=MASK), options=[MGRIT(levels=1)], **slices)
    for layout in ({}, {"qkv_bias": False}):
        model = ViTModel(ViTConfig(**vit(ViTModel).config.to_diff_dict() | layout))
        compare(comm, model, outputs(pixel_values=torch.randn(3, 1, 8, 8)), layers=4, stacked=True)


@float64
def stacked_and_used(comm):
    """Generating, activation checkpointing, frozen biases, saving and what cannot be asked of stacked layers."""
    reference = transformers.LlamaForCausalLM(LlamaConfig(**MODERN)).eval()
    for name, p in reference.named_parameters():
        p.requires_grad_("layernorm" not in name)
    with torch.no_grad():
        reference.lm_head.weight *= 20
    model = parallelize(copy.deepcopy(reference), converged(4), comm=comm, stacked=True)
    assert not model.model.layers.stacked.ln1_weight.requires_grad
    rules = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **rules), reference.generate(IDS, **rules))
    call = outputs(input_ids=IDS, attention_mask=MASK, labels=IDS)
    for on in (False, True):
        for each in (model, reference):
            each.zero_grad()
            (each.train().gradient_checkpointing_enable if on else each.gradient_checkpointing_disable)()
        check(comm, reference, model, call, tolerance=SINGLE)
        assert model.model.layers.conditions.recompute is on
    state = model.state_dict()
    if comm.rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict=dict(state))
            loaded = LlamaForCausalLM.from_pretrained(folder)
        for name, value in reference.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    with tempfile.TemporaryDirectory() as folder:
        if comm.size == 1:
            model.save_pretrained(folder)
            assert torch.equal(
                LlamaForCausalLM.from_pretrained(folder).state_dict()["lm_head.weight"], state["lm_head.weight"]
            )
    refused = "stacked layers cannot be given head_mask"
    raises(ValueError, refused, lambda: model.model.layers(torch.zeros(3, 6, 16), head_mask=MASK))
    raises(ValueError, "is_causal", lambda: model(IDS, is_causal=False))


@float64
def stacked_checkpoints(comm):
    """Weights and AdamW's state go from stacked layers to layers of their own and back: the next step is the same."""
    gemma = transformers.GemmaConfig(**MODERN, **HEADS_OF_8)
    for make in (lambda: gpt2(), lambda: transformers.GemmaForCausalLM(gemma)):
        torch.manual_seed(4)
        models = [parallelize(make(), MGRIT(levels=1), comm=comm, stacked=stacked) for stacked in (True, False, True)]
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3) for m in models]

        def step(model, optimizer):
            loss = F.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        with shared_folder(comm) as folder:
            for n in range(2):
                [step(models[n], optimizers[n]) for _ in range(2)]
                mlpint.checkpoint.save(folder / str(n), 2, models[n], optimizers[n], comm=comm)
                mlpint.checkpoint.load(folder / str(n), models[n + 1], optimizers[n + 1], comm=comm)
                for name, value in models[n].state_dict().items():
                    assert_close(models[n + 1].state_dict()[name], value, 1e-12, name)
                losses = [[step(models[i], optimizers[i]) for _ in range(2)] for i in (n, n + 1)]
                assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5, losses


if __name__ == "__main__":
    run(
        [
            stacked_models,
            stacked_and_used,
            stacked_checkpoints,
            gpt2_models,
            gpt2_with_its_own_loss,
            gpt2_eager_attention,
            gpt2_generates,
            bert_models,
            vit_models,
            llama,
            marian_models,
            t5_models,
            t5_trains,
            translations_are_generated,
            activation_checkpointing,
            dropout_outside_the_stack,
            refused,
            other_stacks_are_refused,
            saved_and_loaded,
        ]
    )
