"""Fine-tuning, serial against layer-parallel, from a BERT on byte pairs; and from nothing.

    mlpint train --config examples/bert.toml --levels 1 --control off --layers 12 --sequence 64 --tokenizer bpe \
        --vocabulary 4096 --steps 2500 --data TEXT --out runs/bert
    python experiments/finetuning.py --bert runs/bert --data en_gum-ud-dev.conllu.gz \
        --validation en_gum-ud-test.conllu.gz

Two tasks of UD English GUM: the type of a sentence (s_type) and the genre of the document that it is from. ``cheap`` is
(1,1) with injection, ``consistent`` the same with the consistency term, ``fitted`` (2,1); all without error control and
with two buffer layers at either end. The test is GUM's other file, whole.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from setting import write

import mlpint
from mlpint.training.command import train
from mlpint.training.config import TrainConfig, read_toml
from mlpint.training.metrics import read_lines
from mlpint.training.tasks import make

TASKS = {"s_type": "s_type", "genre": "meta::genre"}
INJECTION = {"levels": 2, "forward_iters": 1, "backward_iters": 1, "coarse": "injection", "consistency": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "scratch": {"levels": 1, "consistency": 0.0, "init_from": ""},
    "serial": {"levels": 1, "consistency": 0.0},
    "cheap": INJECTION,
    "consistent": INJECTION | {"consistency": 1.0},
    "fitted": INJECTION | {"forward_iters": 2, "coarse": "fitted"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("bert", "data", "validation"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--tasks", default=" ".join(TASKS))
    parser.add_argument("--settings", default=" ".join(SETTINGS))
    parser.add_argument("--seeds", default="0 1 2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="experiments/results/finetuning.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    common = read_toml(Path(__file__).parent.parent / "examples" / "finetune.toml") | {
        "init_from": args.bert,
        "data": args.data,
        "validation": args.validation,
        "tokenizer": str(Path(args.bert) / "tokenizer.json"),
        "layers": 12,
        "sequence": 64,
        "steps": args.steps,
        "control": "off",
        "threads": 1,
        "sample": 0,
        "compare": 8,
    }
    for task in args.tasks.split():
        for seed in map(int, args.seeds.split()):
            for setting in args.settings.split():
                with tempfile.TemporaryDirectory() as folder:
                    values = common | SETTINGS[setting] | {"label": TASKS[task], "seed": seed, "out": f"{folder}/run"}
                    config = TrainConfig.of(values)
                    lines = list(read_lines(train(config, make(config), comm) / "metrics.jsonl"))
                last = [line for line in lines if line.get("val_accuracy") is not None][-1]
                compared = next((line["comparison"] for line in lines if "comparison" in line), None)
                record = {"task": task, "setting": setting, "seed": seed, "steps": args.steps}
                record |= {"bert": Path(args.bert).name}
                record |= {"accuracy": last["val_accuracy"], "loss": last["val_loss"]}
                write(args.out, record | {"cosine": compared and compared["gradient_cosine"]}, comm)
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
