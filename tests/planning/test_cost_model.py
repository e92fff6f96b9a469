"""The cost model gives the figures worked out by hand, and the command says what is fastest."""

import pytest

from mlpint import MGRIT, cli
from mlpint.planning.cost_model import plan


@pytest.mark.parametrize(
    ("forward_iters", "backward_iters", "cfactor", "speedup"),
    [(1, 1, 4, 1.71), (2, 1, 4, 1.33), (1, 1, 8, 1.85)],
)
def test_two_ranks(forward_iters, backward_iters, cfactor, speedup):
    options = MGRIT(cfactor=cfactor, forward_iters=forward_iters, backward_iters=backward_iters)
    costs = plan(32, 2, options)
    assert costs.serial == 96
    assert costs.serial / costs.layer_parallel == pytest.approx(speedup, abs=0.005)


def test_layer_parallel_costs_what_the_work_costs_on_one_rank():
    assert plan(32, 1, MGRIT(forward_iters=1, backward_iters=1)).layer_parallel == 32 + 64


def test_exact_directions_cost_what_the_serial_sweep_costs():
    assert plan(32, 4, MGRIT(forward_iters=0, backward_iters=0)).layer_parallel == 96
    assert plan(32, 4, MGRIT(levels=1), buffers=4).layer_parallel == 96
    mixed = plan(32, 4, MGRIT(forward_iters=0, backward_iters=1)).layer_parallel
    assert mixed == 32 + 8 * 3 / 4 + 2 * 8


def test_pipeline():
    assert plan(32, 4, MGRIT(), microbatches=1).pipeline == 96
    assert plan(32, 4, MGRIT(), microbatches=8).pipeline == pytest.approx(3 * 32 * (8 + 3) / 8 / 4)


def test_more_ranks_than_intervals_do_not_help():
    options = MGRIT(forward_iters=1, backward_iters=1)
    assert plan(32, 100, options).layer_parallel == plan(32, 8, options).layer_parallel


@pytest.mark.parametrize(("coarse", "ranks", "why"), [("injection", 4, "coarse = 'sum'"), ("sum", 3, "ranks = 3")])
def test_layouts_that_cannot_be(capsys, coarse, ranks, why):
    arguments = f"plan --layers 32 --ranks {ranks} --layout cyclic --coarse {coarse}"
    assert cli.main(arguments.split()) != 0
    assert why in capsys.readouterr().err


def test_command(capsys):
    arguments = (
        "plan --layers 32 --ranks 2 --open-layers 0 --close-layers 0 --forward-iters 1 --backward-iters 1".split()
    )
    assert cli.main([*arguments, "--microbatches", "1"]) == 0
    out = capsys.readouterr().out
    assert "layer-parallel     56.0  speed-up  1.71" in out and out.endswith("fastest: layer-parallel\n")
    assert cli.main([*arguments, "--microbatches", "64"]) == 0
    assert capsys.readouterr().out.endswith("fastest: pipeline\n")
