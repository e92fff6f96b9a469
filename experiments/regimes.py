"""The step sizes and the levels of arXiv 2601.09026, in training: held-out loss, true cosine and convergence factors.

    python experiments/regimes.py --only step_size     # h = 1 / N (BERT, ViT) and 1 / L (GPT) beside h = 1
    python experiments/regimes.py --only levels        # 64 layers: two and three levels, F- and FCF-relaxation

Without error control, so that what is seen is the solver's own; one process, the numbers are the same on several ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from setting import arguments, follow, trainer_of

import mlpint

GPT = {"task": "gpt", "lr": 1e-3}
SMALL = {"dim": 64, "heads": 4, "sequence": 32, "batch": 8}
TASKS: dict[str, dict[str, Any]] = {
    "gpt": GPT | {"layers": 20, "dim": 128},
    "bert": {"task": "bert", "layers": 24, "dim": 64, "ffn": 128, "batch": 16, "sequence": 32, "lr": 2e-3},
    "vit": {"task": "vit", "layers": 24, "dim": 64, "ffn": 128, "batch": 32, "lr": 1e-3},
}
CHEAP = "injection:1,1:4"
DEEP = GPT | SMALL | {"layers": 64}
# In the first iteration, which starts from a coarse solve, FCF is F.
LEVELS = [f"injection:{n},{n}:4:{levels}:{r}" for levels in (2, 3) for n, r in ((1, "F"), (2, "F"), (2, "FCF"))]
RUNS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "step_size": [
        (f"{task}, h {h or '1 / N'}" + (", mu 1" if mu else ""), setting, values | {"step_size": h, "consistency": mu})
        for task, values in TASKS.items()
        for h in (1.0, 0.0)
        for setting, mu in (("exact", 0.0), (CHEAP, 0.0), (CHEAP, 1.0))
    ],
    "levels": [("exact", "exact", DEEP)]
    + [
        (setting + (", mu 1" if mu else ""), setting, DEEP | {"consistency": mu})
        for setting in LEVELS
        for mu in (0.0, 1.0)
    ],
}


def main() -> None:
    parser = arguments(__doc__, "regimes", steps=400, check=100, beta2=0.95)
    parser.add_argument("--only", choices=list(RUNS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = mlpint.init()
    for kind, runs in RUNS.items():
        for name, setting, values in runs if args.only in (None, kind) else ():
            args.layers = values["layers"]
            trainer = trainer_of(setting, args, comm, **values)
            follow(f"{name} {setting}", trainer, args, comm, {"kind": kind, "run": name, "setting": setting})


if __name__ == "__main__":
    main()
