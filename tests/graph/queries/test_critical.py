"""Critical points: each kind by construction."""

import math

import pytest

from gradflow.graph import LayerGraph
from tests.graph.dags import residual


def kinds(graph, **thresholds):
    return {p.name: p.kind for p in graph.critical_points(**thresholds)}


def test_sources_and_sinks_on_a_chain():
    graph = LayerGraph.from_flows(
        {"a": 0.5, "b": 5.0, "c": 1.0, "loss": 1.0}, {("a", "b"): 0.5, ("b", "c"): 5.0, ("c", "loss"): 1.0}
    )
    assert kinds(graph) == {"b": "sink", "c": "source"}
    sink, source = graph.critical_points()
    assert sink.strength >= source.strength
    assert source.reason == "c amplifies the gradient (gain 5, divergence +0.92)."
    assert sink.gain == pytest.approx(0.1)
    assert sink.divergence == pytest.approx(math.tanh(math.log(0.1)))
    assert kinds(graph, divergence=0.95) == {"b": "sink"}


def test_vortices_and_saddles_round_a_dead_branch():
    points = {p.name: p for p in residual(1e-4).critical_points()}
    third = math.log(1e4) / 3
    assert points["fc"].kind == "saddle"  # it absorbs, and the ways round it disagree
    assert points["fc"].curl == pytest.approx(third)
    assert points["add"].kind == "vortex"
    assert points["add"].curl == pytest.approx(third * math.sqrt(2 / 3))
    assert points["add"].strength == pytest.approx(points["add"].curl / math.log(2))
    assert "the ways round add keep unlike shares" in points["add"].reason
    assert ", and the ways round fc" in points["fc"].reason
    assert kinds(residual(0.9)) == {}
    assert "add" not in kinds(residual(1e-4), curl=3.0)


@pytest.mark.parametrize(("elements", "expected"), [(1, {}), (0, {}), (8, {"mean": "sink"})])
def test_a_mean_over_the_batch_is_left_out(elements, expected):
    graph = LayerGraph.from_flows(
        {"fc": 0.1, "mean": 1.0, "loss": 1.0},
        {("fc", "mean"): 0.1, ("mean", "loss"): 1.0},
        ops=("mean",),
        num_elements={"mean": elements},
    )
    assert kinds(graph) == expected


@pytest.mark.parametrize("arguments", [{"divergence": 0.0}, {"divergence": 1.0}, {"curl": 0.0}])
def test_thresholds_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected 0 < divergence < 1 and curl > 0, got"):
        residual(1.0).critical_points(**arguments)
