"""Blocks of modules against the vectors that cross their borders."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow.errors import GraphUnavailableError, UnknownLayerError
from gradflow.graph import LayerGraph
from gradflow.records import GraphRecord
from tests.graph.dags import edge, edges_of, network, node, topology


@st.composite
def blocked(draw):
    num, seed = draw(st.integers(4, 10)), draw(st.integers(0, 10_000))
    names = {i: f"{draw(st.sampled_from('abc'))}.n{i}" for i in range(num - 1)}
    net = network(edges_of(seed, num, 1.0), seed=seed, modules=names)
    block = {f"n{i}": name[0] for i, name in names.items()} | {"loss": "loss"}
    return net, block


@settings(max_examples=80, deadline=None)
@given(blocked())
def test_flows_between_blocks_lie_where_vectors_can_and_are_exact_where_they_must(case):
    net, block = case
    blocks = net.graph.at(depth=1)
    assert set(blocks) == set(block.values())
    pairs = {(block[u], block[v]) for u, v in net.maps if block[u] != block[v]}
    assert set(blocks.edges) == pairs
    for a, b in pairs:
        squares, low, high, exact = 0.0, 0.0, 0.0, True
        for u in (n for n in block if block[n] == a):
            some = [net.cotangents[u, v][0] for v in block if (u, v) in net.maps and block[v] == b]
            if not some:
                continue
            others = [v for v in block if (u, v) in net.maps and block[v] != b]
            norms = [np.linalg.norm(c) for c in some]
            squares += np.linalg.norm(sum(some)) ** 2
            low += max(0.0, 2 * max(norms) - sum(norms)) ** 2
            high += sum(norms) ** 2
            exact &= len(some) == 1 or not others
        flow = blocks.edge(a, b).flow
        assert np.sqrt(low) - 1e-9 <= flow <= np.sqrt(high) + 1e-9
        if exact:
            assert flow == pytest.approx(np.sqrt(squares), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(blocked())
def test_the_output_gradient_of_a_block_is_what_reaches_its_exits_from_outside(case):
    net, block = case
    blocks = net.graph.at("*")
    for a in set(block.values()) - {"loss"}:
        squares, exact, exits = 0.0, True, []
        members = [n for n in block if block[n] == a]
        for u in members:
            outs = [v for v in block if (u, v) in net.maps]
            outside = [net.cotangents[u, v][0] for v in outs if block[v] != a]
            exits += [u] if outside else []
            squares += np.linalg.norm(sum(outside)) ** 2 if outside else 0.0
            exact &= len(outside) in (0, 1, len(outs))
        if exact and exits:
            assert blocks[a].grad_norm == pytest.approx(np.sqrt(squares), rel=1e-9)
        assert blocks[a].kind == ("block" if len(members) > 1 else "layer")
        assert set(blocks[a].parameters) == {f"{n}.weight" for n in members}
        if len(members) > 1:
            assert blocks[a].num_elements == sum(net.graph[u].num_elements for u in exits)
            into = [blocks.edge(u, v).flow for u, v in blocks.edges if v == a]
            if into and exits:
                gain = np.linalg.norm(into) / blocks[a].grad_norm
                assert blocks[a].gain == pytest.approx(gain, rel=1e-9)


def encoder():
    """enc.layers.{0,1} of fc and act with a residual addition inside, then an op of the model, then head."""
    nodes = [node("input.0", "input")]
    edges, last = [], "input.0"
    for i in range(2):
        fc, relu, add = f"enc.layers.{i}.fc", f"relu{i}", f"add{i}"
        nodes += [
            node(fc),
            node(relu, "op", layer=f"enc.layers.{i}"),
            node(add, "op", layer=f"enc.layers.{i}"),
        ]
        edges += [edge(last, fc), edge(fc, relu), edge(relu, add), edge(last, add)]
        last = add
    nodes += [node("mean", "op", layer=""), node("head"), node("loss", "loss")]
    edges += [edge(last, "mean"), edge("mean", "head"), edge("head", "loss")]
    return LayerGraph(GraphRecord(nodes=nodes, edges=edges))


def test_patterns_and_depths():
    graph = encoder()
    blocks = graph.at("enc.layers.*")
    assert list(blocks) == ["input.0", "enc.layers.0", "enc.layers.1", "head", "loss"]
    assert set(blocks.edges) == {
        ("input.0", "enc.layers.0"),
        ("enc.layers.0", "enc.layers.1"),
        ("enc.layers.1", "head"),
        ("head", "loss"),
    }
    assert blocks.level == "enc.layers.*"
    assert list(graph.at(depth=3)) == list(blocks)
    assert list(graph.at(depth=1)) == ["input.0", "enc", "head", "loss"]
    assert graph.at(depth=1).level == "depth 1"
    assert list(graph.at("enc.layers.[1]")) == ["input.0", "enc.layers.0.fc", "enc.layers.1", "head", "loss"]
    assert list(graph.layers().at("enc.*")) == ["input.0", "enc.layers", "head", "loss"]


def test_a_layer_alone_in_its_block_keeps_what_was_measured():
    graph = LayerGraph.from_flows(
        {"a.fc": 2.0, "b": 3.0, "loss": 1.0}, {("a.fc", "b"): 2.0, ("b", "loss"): 3.0}
    )
    block = graph.at(depth=1)["a"]
    assert (block.kind, block.type, block.grad_norm) == ("layer", "layer", 2.0)


def test_a_severed_border_keeps_its_reason():
    nodes = [node("a.x"), node("a.y"), node("b.z"), node("b.w"), node("loss", "loss")]
    edges = [
        edge("a.x", "a.y"),
        edge("a.y", "b.z", severed=True, reason="detach"),
        edge("a.x", "b.z", severed=True),
        edge("b.z", "b.w"),
        edge("b.w", "loss"),
    ]
    blocks = LayerGraph(GraphRecord(nodes=nodes, edges=edges)).at(depth=1)
    assert blocks.edge("a", "b").severed
    assert blocks.edge("a", "b").reason == "detach"
    assert [layer.name for layer in blocks.unreachable()] == ["a"]


def test_unreachable_blocks_keep_a_reason():
    nodes = [
        node("a.x", reachable=False, reason="cut by detach."),
        node("a.y", reachable=False),
        node("loss", "loss"),
    ]
    edges = [edge("a.x", "a.y"), edge("a.y", "loss", severed=True)]
    block = LayerGraph(GraphRecord(nodes=nodes, edges=edges)).at(depth=1)["a"]
    assert (block.reachable, block.reason) == (False, "cut by detach.")


def test_a_block_that_is_entered_twice_makes_a_cycle_that_says_so():
    graph = LayerGraph.from_flows(
        {"core.a": 1.0, "mid.b": 1.0, "core.c": 1.0, "mid.d": 2.0, "loss": 1.0},
        {
            ("core.a", "mid.b"): 1.0,
            ("mid.b", "core.c"): 1.0,
            ("core.c", "mid.d"): 1.0,
            ("mid.d", "loss"): 2.0,
        },
    )
    blocks = graph.at(depth=1)
    assert set(blocks.edges) == {("core", "mid"), ("mid", "core"), ("mid", "loss")}
    assert np.isfinite(blocks["core"].gain)
    assert blocks.hodge.cyclic.shape == (3,)
    assert blocks.unreachable() == ()
    blocks.bottlenecks()
    blocks.critical_points()
    blocks.compare(blocks)
    for name, call in (
        ("path", lambda: blocks.path("loss", "core")),
        ("transmission", lambda: blocks.transmission("loss", "core")),
        ("circulation", blocks.circulation),
    ):
        with pytest.raises(GraphUnavailableError, match=f"graph.{name} needs a graph without cycles"):
            call()


def test_a_block_named_like_another_node():
    nodes = [node("loss.scale"), node("loss.shift"), node("loss", "loss")]
    edges = [edge("loss.scale", "loss.shift"), edge("loss.shift", "loss")]
    blocks = LayerGraph(GraphRecord(nodes=nodes, edges=edges)).at(depth=1)
    assert list(blocks) == ["loss (block)", "loss"]


def test_a_topology_and_its_measured_twin_have_the_same_blocks():
    names = {i: f"{'ab'[i % 2]}.n{i}" for i in range(11)}
    net = network(edges_of(1, 12, 1.0), seed=1, modules=names)
    assert LayerGraph(topology(net.record)).at(depth=1).edges == net.graph.at(depth=1).edges


@pytest.mark.parametrize("arguments", [{}, {"pattern": "a", "depth": 1}])
def test_exactly_one_of_pattern_and_depth(arguments):
    with pytest.raises(ValueError, match=r"a pattern such as .* exactly one of them"):
        encoder().at(**arguments)


def test_depth_below_one():
    with pytest.raises(ValueError, match="expected depth of at least 1, got 0"):
        encoder().at(depth=0)


def test_a_pattern_that_matches_nothing():
    with pytest.raises(UnknownLayerError, match=r"no entry named 'encoder.\*'. The nearest of 5 names: "):
        encoder().at("encoder.*")
