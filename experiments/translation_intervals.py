"""Where the intervals of a translator's time line may lie: MGRIT's gradient against the exact one on one batch.

The layers of the encoder move X and those of the decoder Y. An interval that has both is stepped over, with
`injection`, by an encoder layer alone. Needs the checkpoint of an exact run, and the text it was trained on:

    mlpint train --config examples/translation.toml --data TEXT --levels 1 --checkpoint-every 300 --out runs/serial
    python experiments/translation_intervals.py runs/serial --data TEXT
"""

import argparse
import copy
import itertools

import torch

from mlpint import MGRIT, LayerParallel, checkpoint
from mlpint.training import tasks
from mlpint.training.config import TrainConfig, from_saved

# cfactor, open and close layers
INTERVALS = ((2, 0, 0), (2, 2, 2), (2, 0, 4), (2, 1, 1), (3, 0, 0), (3, 1, 2), (4, 0, 4))
ITERATIONS = ((1, 1), (2, 1), (2, 2))
OPERATORS = ("injection", "fitted", "sum")
LEARN = 12  # batches that the learnt operator sees first


def gradient(task, model, blocks, batch):
    """Over the layers alone, with the model's blocks replaced."""
    network = copy.copy(model)
    network._modules = {**model._modules, "blocks": blocks}
    model.zero_grad(set_to_none=True)
    task.loss(network, batch).backward()
    return torch.cat([p.grad.flatten().double() for p in model.blocks.parameters()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory or checkpoint")
    parser.add_argument("--data", required=True, help="the parallel text")
    parser.add_argument("--batch", type=int, default=32, help="sentences (default 32)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = checkpoint.open_checkpoint(options.run)
    values = from_saved(found.info["config"]) | {"data": options.data, "dropout": 0.0, "batch": options.batch}
    task = tasks.make(TrainConfig.of(values | {"resume": ""}))
    model = task.model()
    checkpoint.load(found, model)
    batch = task.train(1000)
    exact = gradient(task, model, model.blocks, batch)
    print(f"step {found.step}, {len(model.blocks)} layers, {task.encoder_layers} of the encoder; {torch.__version__}")
    for coarse, (k_f, k_b), (cfactor, first, last) in itertools.product(OPERATORS, ITERATIONS, INTERVALS):
        mgrit = MGRIT(cfactor=cfactor, forward_iters=k_f, backward_iters=k_b, coarse=coarse)
        blocks = LayerParallel(model.blocks, mgrit, open_layers=first, close_layers=last)
        for n in range(LEARN if coarse == "fitted" else 0):
            gradient(task, model, blocks, task.train(1001 + n))
        g = gradient(task, model, blocks, batch)
        spans = (task.encoder_layers - first) % cfactor != 0
        error, cosine = (g - exact).norm() / exact.norm(), g @ exact / (g.norm() * exact.norm())
        print(
            f"{coarse:<10}({k_f},{k_b}) cf {cfactor}, {first} open and {last} close layers, an interval spans both: "
            f"{'yes' if spans else 'no ':<4} error {float(error):.3f}  cosine {float(cosine):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
