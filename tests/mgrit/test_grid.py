"""Levels, intervals and ownership for any number of layers, coarsening factor and ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpint._core import Grid, Partition

steps_, cfactors, levels_ = st.integers(1, 200), st.integers(2, 20), st.integers(1, 6)


def points(grid, level):
    return [grid.position(level, k) for k in range(grid.steps(level) + 1)]


@given(steps_, cfactors, levels_)
def test_levels_nest_and_keep_the_last_point(steps, cfactor, levels):
    grid = Grid(steps, cfactor, levels)
    assert points(grid, 0) == list(range(steps + 1))
    for level in range(1, grid.levels):
        fine, coarse = points(grid, level - 1), points(grid, level)
        assert coarse[:-1] == fine[:-1:cfactor] and coarse[-1] == steps
        assert sum(grid.length(level, k) for k in range(grid.steps(level))) == steps
    assert grid.levels == 1 or grid.steps(1) == -(-steps // cfactor)
    if levels > 1:
        assert grid.levels > 1
    if grid.levels < levels:
        assert grid.steps(grid.levels - 1) == 1


@given(steps_, cfactors, levels_)
def test_the_mirror_has_the_same_intervals(steps, cfactor, levels):
    grid = Grid(steps, cfactor, levels)
    mirror = grid.mirrored()
    for level in range(grid.levels):
        assert points(mirror, level) == [steps - p for p in reversed(points(grid, level))]
        assert points(mirror.mirrored(), level) == points(grid, level)


@given(steps_, st.integers(1, 20), st.integers(1, 40))
def test_each_layer_has_exactly_one_owner(steps, granularity, ranks):
    offsets = Partition.even(steps, granularity, ranks)
    assert len(offsets) == ranks + 1 and offsets[0] == 0 and offsets[-1] == steps
    partition = Partition(offsets, steps)
    owned = [partition.owner(p) for p in range(steps)]
    assert owned == sorted(owned)
    for rank in range(ranks):
        assert owned.count(rank) == offsets[rank + 1] - offsets[rank]
    intervals = [-(-(b - a) // granularity) for a, b in zip(offsets, offsets[1:], strict=False)]
    assert max(intervals) - min(intervals) <= 1, "an even deal of whole intervals"
    assert all(p % granularity == 0 or p == steps for p in offsets)
    mirror = partition.mirrored()
    assert [mirror.owner(steps - 1 - p) for p in range(steps)] == [ranks - 1 - r for r in owned]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Grid(0, 2, 2), "at least one step, got 0"),
        (lambda: Grid(4, 1, 2), "cfactor must be at least 2, got 1"),
        (lambda: Grid(4, 2, 0), "levels must be at least 1, got 0"),
        (lambda: Partition([0, 3, 2, 4], 4), "offsets must rise from 0 to the number of steps, 4"),
        (lambda: Partition([0, 3], 4), "offsets must rise"),
    ],
)
def test_bad_values(make, text):
    with pytest.raises(ValueError, match=text):
        make()
