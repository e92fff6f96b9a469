"""Which rank owns which layer, in the network itself and in those made of some of its layers."""

import dataclasses

import pytest

from mlpint import MGRIT
from mlpint.mgrit.layout import Layout


def test_block_layout():
    layout = Layout.deal("block", 15, 3, MGRIT(cfactor=4), open_layers=1, close_layers=2, step_size=0.5)
    assert layout.owners == (0,) * 4 + (1,) * 4 + (2,) * 4
    assert (len(layout), layout.depth, layout.first_rank, layout.last_rank) == (15, 12, 0, 2)
    assert [layout.rank_of(n) for n in range(15)] == [0] * 5 + [1] * 4 + [2] * 6
    assert [layout.step_size_of(n) for n in range(15)] == [1] + [0.5] * 12 + [1, 1]
    assert (layout.open_indices, layout.close_indices) == (range(1), range(13, 15))
    assert layout.local_indices(1) == (5, 6, 7, 8) and layout.idle_ranks == []


def test_cyclic_layout():
    layout = Layout.deal("cyclic", 8, 4, MGRIT(cfactor=4))
    assert layout.owners == (0, 1, 2, 3) * 2 and layout.local_indices(1) == (1, 5)
    assert Layout.deal("cyclic", 8, 4, MGRIT(cfactor=2)).owners == (0, 1, 0, 1, 2, 3, 2, 3)


def test_idle_ranks():
    assert Layout.deal("block", 5, 4, MGRIT(cfactor=4)).idle_ranks == [2, 3]
    assert Layout.deal("block", 5, 4, MGRIT(levels=1)).idle_ranks == []


def test_a_network_of_some_of_the_layers():
    layout = Layout.deal("block", 11, 2, MGRIT(cfactor=4), open_layers=1, close_layers=2, step_size=0.5)
    coarse = layout.select([1, 3, 5, 7], 2.0)
    assert coarse.layers == (0, 1, 3, 5, 7, 9, 10) and coarse.owners == (0, 0, 1, 1)
    assert [coarse.step_size_of(n) for n in range(7)] == [1] + [1.0] * 4 + [1, 1]
    assert [coarse.rank_of(n) for n in range(7)] == [layout.rank_of(n) for n in coarse.layers]
    other = layout.select([2, 4, 6, 8], 2.0)
    assert other != coarse and other.owners == coarse.owners
    assert {coarse: 1}[layout.select((7, 5, 3, 1), 2.0)] == 1
    assert coarse.select([2, 4], 2.0).layers == (0, 3, 7, 9, 10)


def test_a_rank_without_layers_in_the_middle():
    layout = Layout.deal("block", 9, 3, MGRIT(cfactor=3)).select([0, 1, 6], 1.0)
    assert layout.owners == (0, 0, 2) and layout.idle_ranks == [1]
    assert [layout.partition().owner(p) for p in range(3)] == [0, 0, 2]


def test_layouts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout.deal("block", 4, 1, MGRIT()).ranks = 2
