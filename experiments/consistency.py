"""Training with the consistency term: which mu keeps (1,1) with the gradient of exact sweeps, and what it costs.

    python experiments/consistency.py --out experiments/results/consistency.jsonl  # some minutes a row on two cores
    python experiments/consistency.py --only headline --seeds 0 1 2

A byte GPT on the embedded text, AdamW with betas .9 and .95, on 2 ranks. Each row is one `mlpint train`; what the
results have already is not run again. Prints the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

BIN = Path(sys.executable).parent
NARROW_SHAPE = "--dim 32 --heads 2 --sequence 32 --batch 16 --steps 2000 --lr 2e-3 --eval-every 500"
SIZES = {
    "small": "--layers 20 --dim 64 --heads 4 --sequence 32 --batch 8",
    "headline": "--layers 32 --dim 128 --heads 4 --sequence 64 --batch 8",
    # Where depth pays: few weights a layer, so that the deep network is the one that can learn more.
    "narrow": f"--layers 32 {NARROW_SHAPE}",
    "narrow, 8 layers": f"--layers 8 {NARROW_SHAPE}",
    "64 layers": "--layers 64 --dim 64 --heads 4 --sequence 32 --batch 8 --steps 300",
    "128 layers": "--layers 128 --dim 64 --heads 4 --sequence 32 --batch 8 --steps 300",
}
COMMON = (
    "--consistency 0 --steps 1000 --eval-every 100 --eval-batches 20 --beta2 .95 --control off --sample 0 --compare 8 "
    "--log-every 1000"
)
EXACT = "--levels 1"
SETTINGS = {
    "exact": EXACT,
    "exact, mu 1": f"{EXACT} --coarse injection --consistency 1",
    "injection (1,1) cf 4": "--coarse injection --forward-iters 1",
    **{
        f"injection (1,1) cf 4, mu {mu}": f"--coarse injection --forward-iters 1 --consistency {mu}"
        for mu in (0.03, 0.1, 0.3, 1, 3)
    },
    "injection (1,1) cf 4, mu 1, control": "--coarse injection --forward-iters 1 --consistency 1 --control gradient "
    "--control-every 100",
    "injection (1,1) cf 4, mu adapted": "--coarse injection --forward-iters 1 --consistency 1 --control gradient "
    "--control-every 100 --control-consistency",
    "injection (1,1) cf 4, mu 1 to 0": "--coarse injection --forward-iters 1 --consistency 1 --consistency-final 0",
    "injection (1,1) cf 4, residual control": "--coarse injection --forward-iters 1 --control residual "
    "--control-every 50",
    "injection (1,1) cf 8, mu 1": "--coarse injection --forward-iters 1 --cfactor 8 --consistency 1",
    "fitted (1,1) cf 4": "--coarse fitted --forward-iters 1",
    **{f"fitted (1,1) cf 4, mu {mu}": f"--coarse fitted --forward-iters 1 --consistency {mu}" for mu in (0.1, 0.3, 1)},
    "fitted (1,1) cf 8, mu 1": "--coarse fitted --forward-iters 1 --cfactor 8 --consistency 1",
}
SETTINGS |= {
    f"injection (1,1) cf {cf}{named}": f"--coarse injection --forward-iters 1 --cfactor {cf}{flag}"
    for cf in (8, 16)
    for named, flag in (("", ""), (", mu 1", " --consistency 1"))
}
# Sum's steps have no term: they would have to be differentiated at states where no layer is recorded.
SETTINGS |= {f"sum (1,1) cf {cf}": f"--coarse sum --forward-iters 1 --cfactor {cf}" for cf in (4, 8)}
SETTINGS |= {
    f"{name}, muon": f"{SETTINGS[name]} --optimizer muon"
    for name in ("exact", "exact, mu 1", "injection (1,1) cf 4", "injection (1,1) cf 4, mu 1")
}
DEEP = ("exact", *(f"injection (1,1) cf {cf}{mu}" for cf in (4, 8, 16) for mu in ("", ", mu 1")))
NARROW = ("exact", "injection (1,1) cf 4, mu 0.1", "injection (1,1) cf 4, mu 1")
HEADLINE = ("exact", "injection (1,1) cf 4, mu 1", "injection (1,1) cf 8, mu 1", "fitted (1,1) cf 4, mu 1")
OF_SIZE = {"small": tuple(SETTINGS), "headline": HEADLINE, "narrow": NARROW, "narrow, 8 layers": ("exact",)}


def measured(line: dict) -> bool:
    return bool(line.get("control") and line["control"].get("measured"))


def run(size: str, name: str, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        arguments = shlex.split(f"{COMMON} {SIZES[size]} {SETTINGS[name]} --seed {seed} --out {folder}/run")
        command = [BIN / "mpirun", "-n", "2", BIN / "mlpint", "train", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in steps if measured(line)]
    compared = next((line["comparison"] for line in lines if "comparison" in line), None)
    return {
        "size": size,
        "setting": name,
        "seed": seed,
        "val_loss": {line["step"]: line["val_loss"] for line in steps if line.get("val_loss") is not None},
        "checks": {line["step"]: line["control"]["measured"]["cosine"] for line in checks},
        "factors": {line["step"]: line["control"]["measured"]["convergence_factor"] for line in checks},
        "modes": [(b["step"], b["mode"]) for a, b in pairwise([{}, *steps]) if a.get("mode") != b["mode"]],
        "mu": {line["step"]: line["consistency"] for line in steps[99::100] if "consistency" in line},
        "exact_steps": sum(line["mode"] == "exact" for line in steps) if "--control " in SETTINGS[name] else None,
        "relative_error": {line["step"]: line["relative_error"] for line in steps[99::100] if "relative_error" in line},
        "seconds_a_step": sorted(line["seconds"] for line in steps)[len(steps) // 2],
        "cosine": compared and compared["gradient_cosine"],
        "speedup": compared and compared["exact_seconds"] / compared["seconds"],
        "arguments": arguments[:-2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/results/consistency.jsonl"))
    parser.add_argument("--only", choices=list(SIZES), help="one of the sizes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--settings", nargs="*", help="some of the settings, by name")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(row["size"], row["setting"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for size in [args.only] if args.only else SIZES:
            for name in args.settings or OF_SIZE.get(size, DEEP):
                if (size, name, seed) in done:
                    continue
                rows.append(run(size, name, seed))
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(name, list(rows[-1]["val_loss"].values())[-1], rows[-1]["cosine"], flush=True)
    print("| size | setting | seed | held-out loss at 300 / 500 / 1000 | cosine at 1000 | relative e | s a step |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        losses = " / ".join(f"{value:.3f}" for step, value in row["val_loss"].items() if int(step) in (300, 500, 1000))
        error = next(reversed(row["relative_error"].values()), None)
        cosine = "1" if row["cosine"] is None else f"{row['cosine']:.4f}"
        print(
            f"| {row['size']} | {row['setting']} | {row['seed']} | {losses} | {cosine} | "
            f"{'' if error is None else f'{error:.3f}'} | {row['seconds_a_step']:.3f} |"
        )


if __name__ == "__main__":
    main()
