"""Tries tiny models of the transformers library, built from configurations: right, or refused with which words.

Each model is compared in double precision with itself before `parallelize`: its outputs, and the gradients of all its
parameters, in training mode without dropout, on a batch with padding, swept exactly.

    mpirun -n 2 python experiments/families.py > docs/families.md
    mpirun -n 3 python experiments/families.py llama t5
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from mpi4py import MPI
from torch import nn

import mlpint
from mlpint import MGRIT
from mlpint.comm.communicator import Comm

TOLERANCE = 1e-9
SINGLE = 1e-6  # of models that convert their attention to single precision, whatever their own is
LAYERS, WORDS, BATCH, LENGTH = 4, 48, 2, 10
# Values for whatever a configuration calls its sizes; it takes those that it knows.
WIDTHS = dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"], 32)
DEPTHS = dict.fromkeys(
    ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"]
    + ["num_decoder_layers", "num_encoder_layers"],
    LAYERS,
)
HEADS = dict.fromkeys(
    ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"]
    + ["num_encoder_attention_heads", "num_decoder_attention_heads"],
    4,
)
INNER = dict.fromkeys(
    ["intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"], 64
)
POSITIONS = dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 64)
TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
OTHERS = {"num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "rotary_dim": 8, "type_vocab_size": 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
IMAGES = {"image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 3}
SIZES = {**WIDTHS, **DEPTHS, **HEADS, **INNER, **POSITIONS, **TOKENS, **OTHERS, **EXPERTS, **IMAGES}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    **LATENT,
}
STATES = {"state_size": 8, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
EIGHT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 16}
CONV = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
CONV |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}

WRITERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "gpt2 gpt_bigcode gptj codegen gpt_neox opt bloom mpt llama mistral ministral mixtral qwen2 qwen3 qwen2_moe "
        "qwen3_moe gemma gemma2 gemma3_text phi phi3 falcon starcoder2 stablelm olmo olmo2 olmo3 olmoe granite "
        "granitemoe cohere cohere2 glm glm4 nemotron persimmon helium smollm3 exaone4 arcee seed_oss gpt_oss ernie4_5 "
        "hunyuan_v1_dense xglm biogpt phimoe bitnet diffllama apertus mamba rwkv".split(),
        {},
    ),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "deepseek_v2": {**GROUPS, **EIGHT},
    "deepseek_v3": GROUPS,
    "mamba2": STATES,
}
READERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "bert roberta camembert xlm-roberta distilbert electra albert deberta modernbert mpnet roformer "
        "squeezebert megatron-bert ernie layoutlm convbert nystromformer fnet".split(),
        {},
    ),
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1},
    "esm": {"mask_token_id": 4, "token_dropout": False, "position_embedding_type": "rotary"},
}
SEERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys("vit deit vit_msn dinov2 ijepa".split(), {}),
    "beit": {"drop_path_rate": 0.0},
    "swin": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 2},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [2, 2]},
}
TRANSLATORS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "t5 mt5 umt5 bart mbart marian pegasus m2m_100 plbart blenderbot blenderbot-small prophetnet".split(), {}
    ),
    "longt5": {"local_radius": 3},
    "switch_transformers": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "led": {"attention_window": [4] * LAYERS, "max_encoder_position_embeddings": 64},
}
HEARERS: dict[str, dict[str, Any]] = {**dict.fromkeys("wav2vec2 hubert wavlm".split(), CONV)}


def configuration(kind: str, more: dict[str, Any]) -> Any:
    """A small configuration without dropout of a model type."""
    cls = transformers.CONFIG_MAPPING[kind]
    known = set(inspect.signature(cls.__init__).parameters)
    known |= {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    values = {name: value for name, value in SIZES.items() if name in known}
    values |= {
        name: 0.0 for name in known if any(n in name for n in ("drop", "pdrop", "jitter")) and name != "token_dropout"
    }
    return cls(**(values | more))


def text() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pictures() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)}


def sounds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_values": torch.randn(BATCH, 400, generator=generator, dtype=torch.float64)}


def translations() -> dict[str, torch.Tensor]:
    return text() | {"decoder_input_ids": text()["input_ids"].flip(1)}


KINDS: list[tuple[str, str, dict[str, dict[str, Any]], Callable[[], dict[str, torch.Tensor]]]] = [
    ("decoder", "AutoModelForCausalLM", WRITERS, text),
    ("encoder", "AutoModel", READERS, text),
    ("encoder-decoder", "AutoModelForSeq2SeqLM", TRANSLATORS, translations),
    ("audio", "AutoModel", HEARERS, sounds),
    ("vision", "AutoModel", SEERS, pictures),
]


def make(auto: str, kind: str, more: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(configuration(kind, more))
    if getattr(type(model), "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("eager")  # the default one knows no double precision
    model = model.double().train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # what starts at 0 or 1 would hide errors
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def results(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs and the gradients of the sum of their cubes, by name."""
    torch.manual_seed(3)
    outputs = {
        f"output {name}": value
        for name, value in model(**inputs).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    sum((value**3).sum() for value in outputs.values() if value.requires_grad).backward()
    values = {name: value.detach() for name, value in outputs.items()}
    return values | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative to each tensor's largest entry; gradients that are 0 but for rounding are measured by the others."""
    largest = max(float(value.abs().max()) for value in expected.values() if value.numel())
    worst = 0.0
    for name, value in values.items():
        if name not in expected:
            return float("inf")
        if value.numel():
            scale = max(float(expected[name].abs().max()), 1e-4 * largest)
            worst = max(worst, float((value - expected[name]).abs().max()) / scale)
    return worst


def tried(comm: Comm, auto: str, kind: str, more: dict[str, Any], inputs: dict[str, torch.Tensor]) -> str:
    """What came of one family, in the words of the table. Collective."""
    try:
        reference = make(auto, kind, more)
        changed = copy.deepcopy(reference)
        expected = results(reference, inputs)
    except Exception as error:  # alike on all ranks
        return f"not tried: {type(error).__name__}: {_line(error)}"
    try:
        mlpint.parallelize(changed, MGRIT(levels=1), comm=comm)
        outcome = str(largest_difference(results(changed, inputs), expected))
    except ValueError as error:
        outcome = f"refused ({_line(error)})"
    except Exception as error:
        outcome = f"ERROR: {type(error).__name__}: {_line(error)}"
    outcomes = MPI.COMM_WORLD.allgather(outcome)
    words = [o for o in outcomes if not _is_number(o)]
    if words:  # a refusal on the one rank that has the layer ends the job; the others' errors follow from it
        return next((w for w in words if w.startswith("refused")), words[0])
    worst = max(map(float, outcomes))
    if worst <= TOLERANCE:
        return "right"
    return f"right to single precision ({worst:.0e})" if worst <= SINGLE else f"WRONG by {worst:.1e}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).replace("|", "/")[:300]


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    comm = mlpint.init()
    wanted = set(sys.argv[1:])
    if comm.rank == 0:
        print("# Families of the transformers library\n")
        print(
            f"`experiments/families.py` on {comm.size} ranks with transformers {transformers.__version__}, torch "
            f"{torch.__version__.split('+')[0]}: tiny models\nfrom their configurations, exact sweeps, against the "
            "model before `mlpint.parallelize`, in double precision. *Right*: outputs\nand all gradients agree to "
            f"{TOLERANCE:.0e} of the largest entry. *Refused*: a `ValueError` with these words.\n"
        )
        print("| family | kind | outcome |\n|---|---|---|")
    count: dict[str, int] = {}
    for what, auto, families, inputs in KINDS:
        for kind, more in families.items():
            if wanted and kind not in wanted:
                continue
            # Its own communicator: a pass that fails, as a refusal in a layer does, leaves the ranks out of step.
            outcome = tried(Comm.of(MPI.COMM_WORLD.Dup()), auto, kind, more, inputs())
            word = outcome.split()[0].strip(":")
            count[word] = count.get(word, 0) + 1
            if comm.rank == 0:
                print(f"| {kind} | {what} | {outcome} |", flush=True)
    if comm.rank == 0:
        print("\n" + ", ".join(f"{n} {word}" for word, n in count.items()) + ".")


if __name__ == "__main__":
    main()
