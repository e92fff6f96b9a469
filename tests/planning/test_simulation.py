"""The simulated step gives the figures worked out by hand; what the real solver counts is in test_critical_path.py."""

import time

import pytest

from mlpint import MGRIT
from mlpint.planning.simulation import Costs, layer_parallel, pipeline
from mlpint.planning.ways import Network, Way, all_ways, price

FREE = Costs()


@pytest.mark.parametrize(("iterations", "cfactor", "units"), [((1, 1), 4, 56), ((2, 1), 4, 72), ((1, 1), 8, 52)])
def test_two_ranks(iterations, cfactor, units):
    assert layer_parallel(32, 2, MGRIT(2, cfactor, *iterations), FREE).time == units


def test_layer_parallel_costs_what_the_work_costs_on_one_rank():
    step = layer_parallel(32, 1, MGRIT(2, 4, 1, 1), FREE)
    assert step.time == step.busy == 32 + 64


def test_exact_directions_cost_what_the_serial_sweep_costs():
    assert layer_parallel(32, 4, MGRIT(2, 4, 0, 0), FREE).time == 96
    assert layer_parallel(28, 4, MGRIT(levels=1), FREE, buffers=4).time == 96
    assert layer_parallel(32, 4, MGRIT(2, 4, 0, 1), FREE).time == 32 + 8 * 3 / 4 + 2 * 8


def test_pipeline():
    assert pipeline(32, 4, FREE, 1).time == 96
    assert pipeline(32, 4, FREE, 8).time == 3 * 32 * (8 + 3) / 8 / 4
    assert pipeline(32, 4, Costs(slices={8: 2.0}), 8).time == 2 * 3 * 32 * (8 + 3) / 8 / 4


def test_messages_and_the_head_take_time():
    options = MGRIT(2, 4, 1, 1)
    free = layer_parallel(32, 4, options, FREE, chain_slices=2).time
    assert layer_parallel(32, 4, options, Costs(head=5), chain_slices=2).time == free + 5
    assert layer_parallel(32, 4, options, Costs(latency=1), chain_slices=2).time >= free + 2 * 2 + 2 * 2
    assert layer_parallel(32, 1, options, Costs(latency=1), chain_slices=2).time == 96


def test_replicas_divide_the_batch_and_add_gradients_up():
    network = Network(32, batch=8, layer_bytes=100, outside_bytes=50, sample_bytes=10)
    row = price(Way(2, 2, MGRIT(2, 4, 1, 1)), network, FREE, sync=1.0, bandwidth_time=0.01)
    assert row.time == 56 / 2 + 2 + 2 * 0.5 * (16 * 100 + 50) * 0.01
    assert row.memory == 4 * (16 * 100 + 50) + 16 * 10 * 4
    assert row.cosine == 0.491 and price(Way(8), network, FREE).cosine == 1
    for way in (Way(2, 2, MGRIT(2, 4, 1, 1), slices=8), Way(16)):
        with pytest.raises(ValueError, match="samples for each"):
            price(way, network, FREE)


def test_ragged_intervals_go_to_real_ranks():
    """28 layers are 7 intervals: one rank of 6 has two of them, and all wait for it."""
    options = MGRIT(2, 4, 1, 1)
    assert layer_parallel(28, 6, options, FREE).time == 31 > layer_parallel(28, 7, options, FREE).time
    assert price(Way(1, 6, options), Network(28), FREE).idle == 0
    assert price(Way(1, 9, options), Network(28), FREE).idle == 2


def test_thousands_of_ranks_in_seconds():
    network, started = Network(16384, batch=64), time.perf_counter()
    rows = [price(way, network, Costs(transfer=0.2)) for way in all_ways(network, 2048)]
    assert len(rows) > 500 and all(0 <= row.bubble < 1 for row in rows)
    assert time.perf_counter() - started < 60  # seconds on a loaded machine are no concern, minutes would be
