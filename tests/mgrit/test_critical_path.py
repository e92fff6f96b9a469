"""The critical path, counted by benchmarks/critical_path.py, is what the cost model promises, or shorter."""

import importlib.util
from pathlib import Path

import pytest

from mlpint import MGRIT
from mlpint.layers.module_evaluator import ModuleEvaluator
from mlpint.planning.cost_model import plan

PATH = Path(__file__).parents[2] / "benchmarks" / "critical_path.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("critical_path", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(ModuleEvaluator, "_counter", module.counted)
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


@pytest.mark.parametrize("iterations", [(1, 1), (2, 1), (2, 2), (1, 0), (0, 1)])
@pytest.mark.parametrize(
    ("layout", "coarse", "cfactor", "ranks"),
    [("block", "fitted", 4, 4), ("block", "sum", 4, 2), ("block", "sum", 8, 4), ("cyclic", "sum", 4, 4)],
)
def test_plan_prices_what_is_counted(benchmark, layout, coarse, iterations, cfactor, ranks):
    options = MGRIT(2, cfactor, *iterations, coarse=coarse)
    units = benchmark.step_units(64, ranks, options, layout)
    assert plan(64, ranks, options, layout=layout).layer_parallel == pytest.approx(units, rel=0.12)
