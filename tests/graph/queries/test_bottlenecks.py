"""Bottlenecks: dominators by brute force, cuts by closed form, and models drawn by hand."""

import math
from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow.graph import LayerGraph
from gradflow.graph.queries.dominators import cut_capacities, dominator_tree, immediate_dominators
from gradflow.records import GraphRecord
from tests.graph.dags import edge, edges_of, network, node, unknown


def chain(widths, *, gains=None, ranks=None):
    """A chain of layers of these widths, then the loss; layer i passes back gains[i]."""
    names = [f"fc{i}" for i in range(len(widths))]
    norms = [1.0]
    for gain in reversed((gains or [1.0] * len(widths))[1:]):
        norms.append(norms[-1] * gain)
    norms.reverse()
    flows = {(a, b): norm for a, b, norm in zip(names, names[1:], norms, strict=False)}
    return LayerGraph.from_flows(
        {**dict(zip(names, norms, strict=True)), "loss": 1.0},
        {**flows, (names[-1], "loss"): norms[-1]},
        num_elements=dict(zip(names, widths, strict=True)),
        effective_ranks=dict(zip(names, ranks, strict=True)) if ranks else None,
    )


@given(st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=4), max_size=10))
def test_immediate_dominators_against_networkx(successors):
    graph = nx.DiGraph()
    graph.add_node(0)
    graph.add_edges_from((a, b) for a, after in successors.items() for b in after)
    theirs = {node: above for node, above in nx.immediate_dominators(graph, 0).items() if node != 0}
    assert immediate_dominators(successors, 0) == theirs


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 12))
def test_dominators_by_removing_each_node(seed, num):
    net = network(edges_of(seed, num, 0.5), seed=seed, ops={2, num - 2} & set(range(1, num - 1)))
    graph = net.graph
    tree = dominator_tree(graph.table)
    trainable = [n for n in graph if graph[n].parameters]
    for i, name in enumerate(graph):
        behind = {n for n in trainable if n == name or nx.has_path(graph.nx, n, name)}
        without = nx.DiGraph(graph.nx)
        without.remove_node(name)
        lost = {
            n for n in trainable if n == name or not ("loss" in without and nx.has_path(without, n, "loss"))
        }
        assert tree.inside[i] == len(lost)
        assert tree.behind[i] == len(behind)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 11))
def test_cut_capacity_is_the_least_sum_of_any_separating_set(seed, num):
    graph = network(edges_of(seed, num, 0.7), seed=seed).graph
    tree = dominator_tree(graph.table)
    capacity = [1.0 + (seed * 7 + i * 13) % 10 for i in range(num)]
    cuts = cut_capacities(graph.table, tree, capacity.__getitem__)
    names = list(graph)
    spine = tree.chain()
    for near, far in pairwise(spine):
        region = [i for i in cuts if i not in spine and _between(graph, names[far], names[i], names[near])]
        best = math.inf
        for bits in range(1 << len(region)):
            chosen = [region[b] for b in range(len(region)) if bits >> b & 1]
            rest = nx.DiGraph(graph.nx)
            rest.remove_nodes_from([names[i] for i in chosen])
            if not nx.has_path(rest, names[far], names[near]):
                best = min(best, sum(capacity[i] for i in chosen))
        for i in region:
            assert cuts[i] == pytest.approx(best)
    assert all(cuts[i] == capacity[i] for i in spine)


def _between(graph, far, name, near):
    return nx.has_path(graph.nx, far, name) and nx.has_path(graph.nx, name, near)


def test_the_throttled_layer_comes_first_with_its_numbers():
    graph = chain([64] * 6, gains=[1, 1, 1, 0.01, 1, 1])
    worst, *others = graph.bottlenecks()
    assert others == []
    assert (worst.name, worst.kind, worst.is_dominator, worst.waist) == ("fc3", "layer", True, False)
    assert worst.gain == pytest.approx(0.01)
    assert worst.gain_ratio == pytest.approx(0.01)
    assert worst.must_pass == 1.0
    assert worst.score == pytest.approx(math.log(100) * 3 / 6)  # three of six layers lie strictly behind
    assert worst.reason == (
        "fc3 passes on 0.01 of its gradient (usual here: 1); "
        "100% of the trainable layers up to it have no other way to the loss."
    )


def test_a_healthy_chain_and_a_chain_that_vanishes_evenly_have_none():
    assert chain([64] * 6).bottlenecks() == ()
    assert chain([64] * 6, gains=[0.3] * 6).bottlenecks() == ()
    assert chain([64] * 6, gains=[10, 10, 10, 1, 10, 10]).bottlenecks() == ()  # passes all there is


def test_an_autoencoder_has_a_waist_that_is_no_throttle():
    widths = [256, 64, 8, 64, 256]
    found = chain(widths, gains=[1.0, 0.6, 0.6, 0.6, 0.6]).bottlenecks()
    assert [(b.name, b.waist) for b in found] == [("fc2", True)]
    assert found[0].width_before == found[0].width_after == 8 / 256
    assert (
        "is narrow (0.0312 and 0.0312 of the widest before and behind), with a healthy gain"
        in found[0].reason
    )
    sick = chain(widths, gains=[1.0, 0.6, 0.001, 0.6, 0.6]).bottlenecks()
    assert [(b.name, b.waist) for b in sick] == [("fc2", False)]


def test_throttles_rank_above_waists():
    found = chain([256, 64, 8, 64, 256, 256, 256], gains=[1, 1, 1, 1, 1, 0.3, 1]).bottlenecks()
    assert [(b.name, b.waist) for b in found] == [("fc5", False), ("fc2", True)]
    again = chain([256, 64, 8, 64, 256, 256, 256], gains=[1, 1, 1, 1, 1, 0.3, 1])
    assert [b.name for b in again.bottlenecks(1)] == ["fc5"]


def test_a_classifier_that_only_narrows_has_no_waist():
    assert chain([784, 256, 64, 10]).bottlenecks() == ()
    assert chain([784, 700, 784]).bottlenecks() == ()  # not narrow
    assert chain([784, 300, 784]).bottlenecks()[0].name == "fc1"
    assert chain([784, 300, 784]).bottlenecks(narrow=0.3) == ()


def test_of_equal_widths_the_first_to_narrow_is_the_waist():
    assert [b.name for b in chain([256, 8, 8, 8, 256]).bottlenecks()] == ["fc1"]


def test_operations_of_unknown_width_do_not_hide_a_waist():
    names = ["a", "op1", "code", "op2", "same", "op3", "b", "loss"]
    widths = [256, 0, 8, 0, 8, 0, 256, 1]
    nodes = [node(n, "op" if n.startswith("op") else "loss" if n == "loss" else "layer", num_elements=w)
             for n, w in zip(names, widths, strict=True)]  # fmt: skip
    graph = LayerGraph(unknown(nodes, [edge(a, b) for a, b in pairwise(names)]))
    assert [b.name for b in graph.bottlenecks()] == ["code"]


def test_a_low_gain_with_no_layer_behind_throttles_nothing():
    graph = LayerGraph.from_flows(
        {"input": 0.001, "fc0": 1.0, "fc1": 1.0, "loss": 1.0},
        {("input", "fc0"): 0.001, ("fc0", "fc1"): 1.0, ("fc1", "loss"): 1.0},
    )
    assert graph["fc0"].gain == pytest.approx(0.001)
    assert graph.bottlenecks() == ()


def test_the_trunk_is_where_the_data_comes_from_not_the_longer_branch():
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (4, 5)]  # n0 -> n1 -> n2 -> n3 -> op4, n0 -> op4
    graph = network(edges, ops={4}).graph
    assert [graph.table.name(i) for i in dominator_tree(graph.table).chain()] == ["loss", "op4", "n0"]


def test_rank_is_lost_where_it_drops_not_behind_it():
    graph = chain([64] * 5, ranks=[1.1, 1.1, 1.1, 20, 20])
    (found,) = graph.bottlenecks()
    assert found.name == "fc2"
    assert found.rank_ratio == pytest.approx(1.1 / 20)
    assert found.cut_capacity == pytest.approx(1.1)
    assert found.score == pytest.approx(math.log(20 / 1.1) * 3 / 5)  # two behind, and itself
    assert "effective rank 1.1 of the 20 it could have" in found.reason


def test_rank_that_the_shape_has_no_room_for_is_not_lost():
    def ranked(shape):
        values = {"grad_norm": [1.0], "input_grad_norm": [1.0]}
        nodes = [
            node("a", effective_rank=[4.0], **values),
            node("b", effective_rank=[4.0], shape=shape, **values),
            node("c", effective_rank=[30.0], **values),
            node("loss", "loss", grad_norm=[1.0]),
        ]
        edges = [edge("a", "b", flow=[1.0]), edge("b", "c", flow=[1.0]), edge("c", "loss", flow=[1.0])]
        return [b.name for b in LayerGraph(GraphRecord(nodes=nodes, edges=edges, steps=(0,))).bottlenecks()]

    assert ranked((128, 64)) == ["b"]
    assert ranked((128, 4)) == []  # four features
    assert ranked((4, 64)) == []  # four samples
    assert ranked((2, 2, 64)) == []  # four positions
    assert ranked((8, 4, 7, 7)) == []  # four channels
    assert ranked(()) == ["b"]


def test_a_skip_past_the_narrow_part_means_that_nothing_must_pass_there():
    names = {"a": 256, "down": 8, "up": 256, "add": 256}
    flows = {
        ("a", "down"): 1e-4,
        ("down", "up"): 1e-4,
        ("up", "add"): 1.0,
        ("a", "add"): 1.0,
        ("add", "loss"): 1.0,
    }
    graph = LayerGraph.from_flows(
        {"a": 1.0, "down": 1e-4, "up": 1.0, "add": 1.0, "loss": 1.0}, flows, ops=("add",), num_elements=names
    )
    found = {b.name: b for b in graph.bottlenecks()}
    assert "down" not in found
    assert found["up"].must_pass == pytest.approx(2 / 3)  # down and up of a, down and up
    assert math.isnan(found["up"].cut_capacity)  # the skip is open


def test_parallel_ways_share_a_cut():
    graph = LayerGraph.from_flows(
        {"a": 2.0, "p0": 1.0, "p": 1e-3, "q": 1.0, "cat": 1.0, "loss": 1.0},
        {("a", "p0"): 1.0, ("p0", "p"): 1.0, ("a", "q"): 1.0, ("p", "cat"): 1e-3, ("q", "cat"): 1.0,
         ("cat", "loss"): 1.0},
        effective_ranks={"a": 9.0, "p0": 5.0, "p": 2.0, "q": 3.0, "cat": 9.0},
    )  # fmt: skip
    assert {b.name: b.cut_capacity for b in graph.bottlenecks(9)}["p"] == pytest.approx(5.0)


def test_a_gain_of_exactly_zero_is_the_worst_and_stays_finite():
    graph = LayerGraph.from_flows(
        {"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0, "loss": 1.0},
        {("a", "b"): 0.0, ("b", "c"): 0.0, ("c", "d"): 1.0, ("d", "loss"): 1.0},
    )
    worst = graph.bottlenecks()[0]
    assert (worst.name, worst.gain) == ("c", 0.0)
    assert 1 < worst.score < 40


def test_a_mean_over_the_batch_is_no_bottleneck_but_a_dying_operation_is():
    def with_op(elements):
        return LayerGraph.from_flows(
            {"fc": 0.01, "op": 1.0, "loss": 1.0},
            {("fc", "op"): 0.01, ("op", "loss"): 1.0},
            ops=("op",),
            num_elements={"op": elements},
        ).bottlenecks()

    assert with_op(1) == ()
    assert with_op(0) == ()  # of unknown size, and the loss reads it
    assert [(b.name, b.kind) for b in with_op(64)] == [("op", "op")]


def test_structure_and_width_alone():
    widths = {"enc1": 256, "enc2": 64, "code": 8, "act": 8, "dec": 256}
    names = [*widths, "loss"]
    nodes = [node("input.0", "input", num_elements=256)]
    nodes += [node(n, "loss" if n == "loss" else "layer", num_elements=widths.get(n, 1),
                   shape=(4, widths[n] // 4) if n in widths else ()) for n in names]  # fmt: skip
    edges = [edge(a, b) for a, b in zip(["input.0", *names], names, strict=False)]
    (waist,) = LayerGraph(unknown(nodes, edges)).bottlenecks()
    assert (waist.name, waist.waist, waist.is_dominator) == ("code", True, True)
    assert "its gain was not measured" in waist.reason
    assert waist.cut_capacity == 2.0  # (4, 2): features stand in for rank
    assert math.isnan(waist.gain)


def test_a_variational_code_is_found_where_its_halves_meet():
    names = ["h", "mu", "logvar", "z", "dec", "loss"]
    widths = [256, 8, 8, 8, 256, 1]
    kinds = ["layer", "layer", "layer", "op", "layer", "loss"]
    nodes = [node(n, k, num_elements=w) for n, k, w in zip(names, kinds, widths, strict=True)]
    edges = [edge("h", "mu"), edge("h", "logvar"), edge("mu", "z"), edge("logvar", "z"), edge("z", "dec"),
             edge("dec", "loss")]  # fmt: skip
    found = LayerGraph(unknown(nodes, edges)).bottlenecks()
    assert [(b.name, b.waist) for b in found] == [("z", True)]


def test_what_is_cut_off_by_an_operation_is_not_behind_anything():
    nodes = [node("a"), node("b"), node("loss", "loss")]
    edges = [edge("a", "b", severed=True, reason="detach"), edge("b", "loss")]
    graph = LayerGraph(unknown(nodes, edges))
    tree = dominator_tree(graph.table)
    assert tree.parent == [None, 2, -1]
    assert tree.trainable == 1
    assert graph.bottlenecks() == ()
    assert LayerGraph(unknown([], [])).bottlenecks() == ()


def test_large_regions_are_left_out(monkeypatch):
    monkeypatch.setattr("gradflow.graph.queries.dominators.MAX_REGION", 1)
    graph = network([(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)]).graph
    tree = dominator_tree(graph.table)
    assert set(cut_capacities(graph.table, tree, lambda _: 1.0)) == set(tree.chain())


@pytest.mark.parametrize("arguments", [{"k": 0}, {"throttle": 0.0}, {"narrow": 1.5}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected k of at least 1, and throttle and narrow in"):
        chain([4, 4]).bottlenecks(**arguments)
