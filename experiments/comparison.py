"""Serial training against layer-parallel training on five tasks (arXiv 2601.09026, section 4).

    python experiments/comparison.py --tasks gpt --settings serial --seeds "0 1 2"
    mpirun -n 2 python experiments/comparison.py --tasks "gpt tagging" --settings "paper best"

Each run is examples/TASK.toml with a setting's keys over it, from the same seed and in the same data order whatever the
setting. ``paper``: the solver as there, as far as known: injection, its iterations and coarsening. ``best``: learnt
coarse steps under error control. ``consistent``: (1,1) with injection, the cheapest there is, and the consistency term,
under error control. Tasks whose data nobody carries need --data: the directory with the files named in DATA.
Classification starts from the BERT that the serial run of ``bert`` has trained, so run that first, or from nothing in
the setting ``scratch``. Every run's directory is kept under --runs, so that ``mlpint report`` can draw them
over each other; what they measured goes to the results, a line a run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from setting import write

import mlpint
from mlpint.training.command import train
from mlpint.training.config import KEYS, TrainConfig, read_toml
from mlpint.training.fields import parsed
from mlpint.training.metrics import read_lines
from mlpint.training.tasks import make

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = {
    "gpt": {"data": "tinyshakespeare.txt"},
    "bert": {},  # the text that Python carries: masked bytes of Shakespeare take longer to be learnt than there is time
    "vit": {},
    "tagging": {"data": "en_gum-ud-dev.conllu.gz", "validation": "en_gum-ud-test.conllu.gz"},
    "translation": {"data": "multi30k"},
    "classification": {"data": "en_gum-ud-dev.conllu.gz", "validation": "en_gum-ud-test.conllu.gz"},
}
EXAMPLE = {"gpt": "gpt2", "classification": "finetune"}  # where it is not called like the task
# What the runs of a task have in common: lengths that end in reasonable time on two cores.
COMMON = {
    "gpt": {"beta2": 0.95, "steps": 500, "eval_every": 100, "eval_batches": 16},
    "bert": {"steps": 700, "checkpoint_every": 700},
    "vit": {},
    "tagging": {},
    "translation": {"steps": 800, "warmup": 150, "eval_every": 200},
    "classification": {},
}
SERIAL = {"levels": 1, "control": "off", "consistency": 0.0}
PAPER = {"coarse": "injection", "control": "off", "consistency": 0.0}
BEST = {
    "coarse": "fitted",
    "cfactor": 4,
    "forward_iters": 2,
    "backward_iters": 1,
    "control": "gradient",
    "consistency": 0.0,
}
BEST |= {"control_every": 50, "open_layers": 2, "close_layers": 2}
CONSISTENT = BEST | {"coarse": "injection", "forward_iters": 1, "consistency": 1.0}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "serial": {task: SERIAL for task in DATA},
    "scratch": {"classification": SERIAL | {"init_from": ""}},
    "paper": {
        "gpt": PAPER | {"forward_iters": 0, "backward_iters": 1},
        "bert": PAPER | {"forward_iters": 1, "backward_iters": 1, "open_layers": 0, "close_layers": 0},
        "vit": PAPER | {"forward_iters": 0, "backward_iters": 1, "open_layers": 0, "close_layers": 0},
        "tagging": PAPER | {"forward_iters": 2, "backward_iters": 1},
        "translation": PAPER | {"forward_iters": 2, "backward_iters": 1},
        "classification": PAPER | {"forward_iters": 1, "backward_iters": 1, "open_layers": 0, "close_layers": 0},
    },
    # Buffers at the decoder's end alone: translation_intervals.py.
    "best": {task: BEST for task in DATA} | {"translation": BEST | {"open_layers": 0, "close_layers": 4}},
    # No interval may span encoder and decoder: injection goes on as the first layer of an interval began.
    "consistent": {task: CONSISTENT for task in DATA}
    | {"translation": CONSISTENT | {"cfactor": 3, "open_layers": 0, "close_layers": 3}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=" ".join(DATA))
    parser.add_argument("--settings", default="serial paper best")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--data", default="data", help="directory with the data")
    parser.add_argument("--runs", default="runs/comparison", help="where the runs' directories go")
    parser.add_argument("--keys", default="", help="more keys, for instance 'layers=6 steps=100'; named in the results")
    parser.add_argument("--out", default="experiments/results/comparison.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    for task in args.tasks.split():
        for setting in args.settings.split():
            for seed in map(int, args.seeds.split()):
                one(task, setting, seed, args, comm)


def one(task: str, setting: str, seed: int, args: argparse.Namespace, comm: mlpint.Comm) -> None:
    values = read_toml(EXAMPLES / f"{EXAMPLE.get(task, task)}.toml") | COMMON[task]
    values |= {key: str(Path(args.data) / name) for key, name in DATA[task].items()}
    if task == "classification":
        values["init_from"] = str(Path(args.runs) / "bert-serial-0")
    values |= SETTINGS[setting][task]
    more = dict(pair.split("=") for pair in args.keys.split())
    values |= {key: value == "true" or parsed(KEYS[key], value) for key, value in more.items()}
    name = "-".join([task, setting, str(seed), *args.keys.split()])
    values |= {"seed": seed, "threads": 1, "out": str(Path(args.runs) / name)}
    values |= {"compare": 0 if setting == "serial" else 11}
    config = TrainConfig.of(values)
    directory = train(config, make(config), comm)
    if comm.rank == 0:
        steps = [line for line in read_lines(directory / "metrics.jsonl") if "step" in line]
        record = {"task": task, "setting": setting, "seed": seed, "keys": args.keys} | summary(steps)
        write(args.out, record, comm)
        print(json.dumps({key: value for key, value in record.items() if key not in ("curves", "modes")}), flush=True)


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The validation curves, the last of each measure, time and the share of exact steps."""
    trained = [line for line in lines if "loss" in line]
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(("val_", "test_")) and value is not None:
                curves.setdefault(key, []).append((line["step"], value))
    found: dict[str, Any] = {key: points[-1][1] for key, points in curves.items()}
    seconds = sorted(line["seconds"] for line in trained)
    found["steps"], found["seconds"] = len(trained), sum(seconds)
    found["step_seconds"] = seconds[len(seconds) // 2]
    found["exact_share"] = sum(line["mode"] == "exact" for line in trained) / len(trained)
    if "comparison" in lines[-1]:
        found["comparison"] = lines[-1]["comparison"]
    changes = zip([None, *trained], trained, strict=False)
    found["modes"] = [(b["step"], b["mode"]) for a, b in changes if a is None or a["mode"] != b["mode"]]
    return found | {"curves": curves}


if __name__ == "__main__":
    main()
