"""What changed between two graphs."""

import math

import pytest

from gradflow.graph import LayerGraph
from gradflow.records import FlowRecord
from tests.graph.dags import residual, scaled, topology


def chain(*norms):
    names = [f"fc{i}" for i in range(len(norms))] + ["loss"]
    values = [*norms, 1.0]
    return LayerGraph.from_flows(
        dict(zip(names, values, strict=True)),
        {(a, b): norm for a, b, norm in zip(names, names[1:], values, strict=False)},
    )


def test_a_graph_against_itself():
    change = residual(0.5).compare(residual(0.5))
    assert change.common_shift == 0.0
    assert all(c.size == 0.0 for c in change.nodes)
    assert all(c.omega == 0.0 for c in change.edges)
    assert (change.nodes_before, change.nodes_after, change.severed, change.restored) == ((), (), (), ())


def test_the_gain_that_changed_comes_first():
    change = chain(1, 1, 1, 1, 1).compare(chain(0.1, 0.1, 1, 1, 1))
    sizes = {c.name: c for c in change.nodes}
    assert change.common_shift == 0.0
    assert sizes["fc2"].gain == pytest.approx(-math.log(10))
    assert sizes["fc2"].grad_norm == 0.0
    assert sizes["fc0"].relative == pytest.approx(-math.log(10))
    assert change.edges[0].omega == pytest.approx(-math.log(10))
    assert (change.edges[0].source, change.edges[0].target) == ("fc1", "fc2")
    assert [c.size for c in change.nodes] == sorted((c.size for c in change.nodes), reverse=True)
    assert "fc2: gradient norm +0, gain -2.3 nats" in str(change)


def test_a_rescaled_loss_is_a_common_shift():
    one = residual(0.5)
    change = one.compare(LayerGraph(scaled(one.record, 1e6)))
    assert change.common_shift == pytest.approx(math.log(1e6))
    assert all(abs(c.relative) < 1e-9 and c.size < 1e-9 for c in change.nodes)


def test_what_is_only_on_one_side():
    change = chain(1, 1).compare(chain(1, 1, 1))
    assert change.nodes_before == ()
    assert change.nodes_after == ("fc2",)
    assert change.edges_before == (("fc1", "loss"),)
    assert set(change.edges_after) == {("fc1", "fc2"), ("fc2", "loss")}
    assert "only after: fc2" in str(change)


def test_severed_and_restored():
    change = residual(0.5).compare(residual(0.0))
    assert change.severed == (("a", "fc"),)
    assert "severed: a -> fc" in str(change)
    assert residual(0.0).compare(residual(0.5)).restored == (("a", "fc"),)


def test_a_gradient_that_vanished_altogether_is_the_largest_change():
    change = chain(1, 1, 1).compare(chain(0, 1, 1))
    assert (change.nodes[0].name, change.nodes[0].size) == ("fc0", math.inf)


def test_different_steps_and_no_steps():
    two = LayerGraph.from_flows({"fc0": [1.0, 4.0], "loss": [1.0, 1.0]}, {("fc0", "loss"): [1.0, 4.0]})
    assert chain(2).compare(two).common_shift == pytest.approx(0.0)
    change = chain(2).compare(LayerGraph(topology(chain(2).record)))
    assert (change.nodes, change.edges) == ((), ())
    assert math.isnan(change.common_shift)


def test_a_record_takes_the_place_of_its_graph_where_the_level_says_how():
    record = FlowRecord(steps=1, losses=[1.0], layers=(), parameters=(), graph_record=residual(0.1).record)
    assert residual(0.5).compare(record) == residual(0.5).compare(record.graph)
    layers = residual(0.5).layers()
    assert layers.compare(record) == layers.compare(record.graph.layers())
    with pytest.raises(TypeError, match="expected a LayerGraph at the level 'depth 1', got FlowRecord"):
        residual(0.5).at(depth=1).compare(record)
    with pytest.raises(
        TypeError, match=r"at the level 'full', got GraphRecord. Of a record, pass its .graph"
    ):
        chain(1).compare(chain(1).record)  # type: ignore[arg-type]
