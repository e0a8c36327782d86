"""Circulation against transmissions by hand and sums of the cyclic part."""

from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings

from gradflow.graph import LayerGraph
from tests.graph.dags import network, networks, residual


def test_a_residual_block_is_the_log_ratio_of_its_two_paths():
    graph = LayerGraph.from_flows(
        {"a": 1.0, "fc1": 0.6, "relu": 0.5, "fc2": 1.3, "add": 1.3, "loss": 1.0},
        {
            ("a", "fc1"): 0.2,
            ("fc1", "relu"): 0.6,
            ("relu", "fc2"): 0.5,
            ("fc2", "add"): 1.3,
            ("a", "add"): 1.3,
            ("add", "loss"): 1.3,
        },
        ops=("add", "relu"),
    )
    (block,) = graph.circulation()
    by_hand = (0.2 / 0.6) * (0.6 / 0.5) * (0.5 / 1.3) * (1.3 / 1.3)
    assert block.branch_transmission == pytest.approx(by_hand)
    assert block.shortcut_transmission == pytest.approx(1.0)
    assert block.circulation == pytest.approx(np.log(by_hand))
    assert (block.fork, block.join) == ("a", "add")
    assert block.branch == ("a", "fc1", "relu", "fc2", "add")
    assert block.shortcut == ("a", "add")


@pytest.mark.parametrize("kept", [1e-9, 0.5, 1.0, 40.0])
def test_the_sign_tells_which_side_keeps_more(kept):
    (block,) = residual(kept).circulation()
    assert block.circulation == pytest.approx(np.log(kept), abs=1e-12)
    assert f"{kept:.3g}" in str(block)
    assert "by the skip 1" in str(block)


@settings(max_examples=80, deadline=None)
@given(networks(max_nodes=12))
def test_a_basis_of_cycles_with_the_sums_of_the_cyclic_part(net):
    graph = net.graph
    cycles = graph.circulation()
    place = {pair: i for i, pair in enumerate(graph.edges)}
    rows = np.zeros((len(cycles), len(place)))
    for row, cycle in zip(rows, cycles, strict=True):
        for side, sign in ((cycle.branch, 1.0), (cycle.shortcut, -1.0)):
            assert (side[0], side[-1]) == (cycle.fork, cycle.join)
            for pair in pairwise(side):
                row[place[pair]] += sign
        assert set(cycle.branch[1:-1]).isdisjoint(cycle.shortcut[1:-1])
    np.testing.assert_allclose(rows @ graph.hodge.cyclic, [c.circulation for c in cycles], atol=1e-9)
    np.testing.assert_allclose(
        (rows @ graph.numbers.omega).ravel(), np.ravel([c.per_step for c in cycles]), atol=1e-9
    )
    undirected = nx.Graph(graph.nx)
    assert len(cycles) == undirected.number_of_edges() - undirected.number_of_nodes() + 1
    assert np.linalg.matrix_rank(rows) == len(cycles) if len(cycles) else True
    assert list(cycles) == sorted(cycles, key=lambda c: -abs(c.circulation))


def test_a_chain_has_none():
    assert network([(i, i + 1) for i in range(9)]).graph.circulation() == ()


def test_a_severed_branch_is_in_no_cycle():
    graph = residual(0.0)
    assert graph.circulation() == ()
    assert [(e.source, e.target) for e in graph.severed] == [("a", "fc")]


def test_sides_that_never_meet_make_no_cycle():
    graph = LayerGraph.from_flows(
        {"a": 2.0, "b": 1.0, "c": 1.0}, {("a", "b"): 1.0, ("a", "c"): 1.0}
    )  # two ends, no loss
    assert graph.circulation() == ()


def test_three_ways_make_two_cycles():
    graph = LayerGraph.from_flows(
        {"x": 3.0, "q": 1.0, "k": 1.0, "v": 1.0, "attend": 1.0, "loss": 1.0},
        {("x", "q"): 0.5, ("x", "k"): 0.25, ("x", "v"): 1.0, ("q", "attend"): 1.0, ("k", "attend"): 1.0,
         ("v", "attend"): 1.0, ("attend", "loss"): 1.0},
        ops=("attend",),
    )  # fmt: skip
    sums = {(c.branch[1], c.shortcut[1]): c.circulation for c in graph.circulation()}
    assert sums[("q", "k")] == pytest.approx(np.log(2.0))
    assert sums[("k", "v")] == pytest.approx(np.log(0.25))
