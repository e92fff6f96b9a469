"""The critical path, counted by benchmarks/critical_path.py, is what the cost model promises, or shorter."""

import importlib.util
from pathlib import Path

import pytest

from mlpint import MGRIT
from mlpint.planning.simulation import Costs, layer_parallel

PATH = Path(__file__).parents[2] / "benchmarks" / "critical_path.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("critical_path", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.count_units(monkeypatch.setattr)
    return module


@pytest.mark.parametrize(
    ("layout", "coarse", "iterations", "cfactor", "depth", "ranks"),
    [
        ("block", "injection", (1, 1), 4, 32, 1),
        ("block", "injection", (1, 1), 4, 32, 2),
        ("block", "injection", (1, 1), 8, 32, 4),
        ("block", "injection", (2, 1), 4, 32, 4),
        ("cyclic", "sum", (1, 1), 4, 32, 2),
        ("cyclic", "sum", (1, 1), 4, 32, 4),
        ("cyclic", "sum", (1, 1), 4, 64, 8),
    ],
)
def test_critical_path(benchmark, layout, coarse, iterations, cfactor, depth, ranks):
    options = MGRIT(2, cfactor, *iterations, coarse=coarse)
    units = benchmark.step_units(depth, ranks, options, layout)
    assert 3 * depth / ranks <= units <= benchmark.formula(depth, ranks, options, layout)


@pytest.mark.parametrize(
    ("iterations", "ranks", "speed_up"), [((1, 1), 8, 6.6), ((2, 1), 8, 5.1), ((1, 1), 16, 11.5), ((2, 1), 16, 9.2)]
)
def test_chains_in_slices(benchmark, iterations, ranks, speed_up):
    """Eight slices divide the ranks' waiting, where exact pipelines of eight microbatches reach 4.3 on 8 ranks."""
    options = MGRIT(2, 4, *iterations)
    units = benchmark.step_units(64, ranks, options, "block", slices=8)
    assert 3 * 64 / units >= speed_up
    assert layer_parallel(64, ranks, options, Costs(), chain_slices=8).time == pytest.approx(units, rel=0.001)


@pytest.mark.parametrize("iterations", [(1, 1), (2, 1), (2, 2), (1, 0), (0, 1)])
@pytest.mark.parametrize(
    ("layout", "coarse", "cfactor", "ranks"),
    [("block", "fitted", 4, 4), ("block", "sum", 4, 2), ("block", "sum", 8, 4), ("cyclic", "sum", 4, 4)],
)
def test_plan_prices_what_is_counted(benchmark, layout, coarse, iterations, cfactor, ranks):
    options = MGRIT(2, cfactor, *iterations, coarse=coarse)
    units = benchmark.step_units(64, ranks, options, layout)
    assert layer_parallel(64, ranks, options, Costs(), layout=layout).time == pytest.approx(units, rel=0.12)


@pytest.mark.parametrize(
    ("depth", "ranks", "cfactor", "iterations", "coarse", "slices", "hop"),
    [
        (28, 6, 4, (1, 1), "injection", 1, 0.0),
        (28, 6, 4, (1, 1), "injection", 4, 0.0),
        (33, 4, 4, (1, 1), "scaled", 1, 0.2),
        (30, 3, 8, (1, 2), "fitted", 1, 0.0),
        (13, 3, 2, (1, 1), "injection", 2, 0.0),
        (33, 3, 4, (1, 1), "sum", 4, 0.1),
        (32, 4, 4, (2, 2), "sum", 2, 0.0),
        (40, 5, 4, (3, 2), "injection", 2, 0.1),
        (64, 8, 4, (2, 1), "injection", 8, 0.2),
        (32, 4, 4, (2, 2), "identity", 1, 0.0),
        (7, 1, 3, (2, 2), "injection", 1, 0.5),
    ],
)
def test_the_simulation_is_what_is_counted(benchmark, depth, ranks, cfactor, iterations, coarse, slices, hop):
    """Ragged intervals, slices and hops; it knows nothing of C-points that neighbours exchange."""
    options = MGRIT(2, cfactor, *iterations, coarse=coarse)
    units = benchmark.step_units(depth, ranks, options, "block", slices, hop)
    simulated = layer_parallel(depth, ranks, options, Costs(latency=hop), chain_slices=slices).time
    assert simulated == pytest.approx(units, rel=0.05)
