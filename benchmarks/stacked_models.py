"""A model of the transformers library on one process or several: its layers stacked, one by one, and the model itself.

::

    mpirun -n 2 python benchmarks/stacked_models.py
    python benchmarks/stacked_models.py --batch 1 --sequence 32

A whole training step each, in turn; ratios of medians, with the quartiles of the single rounds' ratios. `plain` is the
model as it is, on one process; stacked and one by one are MGRIT at the same options.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import machine
import torch

import mlpint


def models(args: argparse.Namespace) -> dict[str, Any]:
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = {"hidden_size": args.dim, "num_hidden_layers": args.layers, "num_attention_heads": 4, "vocab_size": 256}
    inner = {"intermediate_size": 4 * args.dim}
    dry = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gpt2 = transformers.GPT2Config(**sizes, **dry, n_positions=args.sequence)
    llama = transformers.LlamaConfig(**sizes, **inner, num_key_value_heads=2)
    return {
        "GPT-2": transformers.GPT2LMHeadModel(gpt2),
        "Llama": transformers.LlamaForCausalLM(llama),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"layers": 32, "dim": 64, "sequence": 64, "batch": 4, "cfactor": 4, "repeats": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    comm = machine.start()
    torch.manual_seed(0)
    tokens = torch.randint(256, (args.batch, args.sequence))
    for name, model in models(args).items():
        ways = {"plain": model} if comm.size == 1 else {}
        for label, stacked in (("one by one", False), ("stacked", True)):
            options = mlpint.MGRIT(cfactor=args.cfactor, forward_iters=1, backward_iters=1)
            ways[label] = mlpint.parallelize(copy.deepcopy(model), options, comm=comm, stacked=stacked)
            for stack in (m for m in ways[label].modules() if isinstance(m, mlpint.LayerParallel)):
                stack.looked_after()
        seconds: dict[str, list[float]] = {label: [] for label in ways}
        for _ in range(args.repeats + 2):
            for label, way in ways.items():
                comm.barrier()
                start = time.perf_counter()
                way.zero_grad()
                way(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                comm.barrier()
                seconds[label].append(time.perf_counter() - start)
        timed = {label: values[2:] for label, values in seconds.items()}
        if comm.rank == 0:
            for label in list(timed)[:-1]:
                middle, low, high = machine.ratio(timed[label], timed["stacked"])
                print(
                    f"{name}, {args.layers} layers, d {args.dim}, {args.batch} x {args.sequence}, {comm.size} ranks: "
                    f"{label} over stacked {middle:.2f} ({low:.2f}-{high:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
