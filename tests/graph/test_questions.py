"""Every question, of every odd graph: an answer that says what it is of, or an error that says what to do."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from gradflow.errors import GraphUnavailableError, UnknownLayerError
from gradflow.graph import LayerGraph
from gradflow.records import GraphRecord
from tests.graph.dags import edge, node, residual, topology

# What a question needs: flows ("flow"), structure alone ("structure"), or neither.
QUESTIONS: dict[str, tuple[str, Callable[[LayerGraph, str, str], object]]] = {
    "numbers": ("flow", lambda g, a, b: g.numbers),
    "hodge": ("flow", lambda g, a, b: g.hodge),
    "hodge_per_step": ("flow", lambda g, a, b: g.hodge_per_step),
    "path": ("flow", lambda g, a, b: g.path(a, b)),
    "weakest_path": ("flow", lambda g, a, b: g.weakest_path(a, b)),
    "transmission": ("flow", lambda g, a, b: g.transmission(a, b)),
    "circulation": ("flow", lambda g, a, b: g.circulation()),
    "bottlenecks": ("flow", lambda g, a, b: g.bottlenecks()),
    "critical_points": ("flow", lambda g, a, b: g.critical_points()),
    "unreachable": ("structure", lambda g, a, b: g.unreachable()),
    "compare": ("structure", lambda g, a, b: g.compare(g)),
    "layers": ("structure", lambda g, a, b: g.layers()),
    "at": ("structure", lambda g, a, b: g.at(depth=1)),
    "fold": ("structure", lambda g, a, b: g.fold()),
    "subgraph": ("structure", lambda g, a, b: g.subgraph("*") if len(g) else ()),
    "to_pandas": ("structure", lambda g, a, b: g.to_pandas()[0]),
    "nx": ("structure", lambda g, a, b: g.nx),
    "to_node_link": ("structure", lambda g, a, b: json.dumps(g.to_node_link(), allow_nan=False)),
    "to_dot": ("structure", lambda g, a, b: g.to_dot()),
    "severed": ("structure", lambda g, a, b: g.severed),
    "edges": ("structure", lambda g, a, b: g.edges),
    "node_values": ("structure", lambda g, a, b: g.node_values()),
    "edge_values": ("structure", lambda g, a, b: g.edge_values()),
    "full": ("structure", lambda g, a, b: g.full),
    "measured": ("structure", lambda g, a, b: g.measured),
    "table": ("structure", lambda g, a, b: g.table),
}
OTHERS = {
    "edge",
    "position",
    "step",
    "from_record",
    "from_flows",
    "from_networkx",
    "minimum_cut",
    "draw",
    "to_graphml",
    "coarser",
}  # tested by themselves
NAMED = ("path", "weakest_path", "transmission")  # asked of two nodes


def empty() -> LayerGraph:
    return LayerGraph(GraphRecord(nodes=[], edges=[], steps=(0,)))


def nan_flows() -> LayerGraph:
    nan = float("nan")
    return LayerGraph.from_flows(
        {"a": nan, "b": nan, "loss": 1.0}, {("a", "b"): nan, ("b", "loss"): nan, ("a", "loss"): nan}
    )


def severed() -> LayerGraph:
    nodes = [
        node(n, grad_norm=[g], input_grad_norm=[g], effective_rank=[1.0]) for n, g in (("a", 0.0), ("b", 1.0))
    ]
    nodes.append(node("loss", "loss", grad_norm=[1.0], input_grad_norm=[1.0], effective_rank=[math.nan]))
    edges = [edge("a", "b", flow=[0.0], severed=True, reason="detach"), edge("b", "loss", flow=[1.0])]
    return LayerGraph(GraphRecord(nodes=nodes, edges=edges, steps=(0,)))


def steps() -> LayerGraph:
    nan = float("nan")  # `b` is not there at the first step, nor `c` at the second
    return LayerGraph.from_flows(
        {"a": [2.0, 3.0], "b": [nan, 3.0], "c": [2.0, nan], "loss": [1.0, 1.0]},
        {
            ("a", "b"): [nan, 3.0],
            ("a", "c"): [2.0, nan],
            ("b", "loss"): [nan, 3.0],
            ("c", "loss"): [2.0, nan],
        },
    )


GRAPHS: dict[str, Callable[[], LayerGraph]] = {
    "one node": lambda: LayerGraph.from_flows({"loss": 1.0}, {}),
    "disconnected": lambda: LayerGraph.from_flows({"a": 1.0, "b": 1.0, "loss": 1.0}, {("b", "loss"): 1.0}),
    "severed": severed,
    "nan": nan_flows,
    "steps": steps,
    "usual": lambda: residual(0.5),
}


def test_the_table_holds_every_public_question() -> None:
    public = {name for name, _ in inspect.getmembers(LayerGraph) if not name.startswith("_")}
    assert public == set(QUESTIONS) | OTHERS


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_topology_answers_what_structure_tells_and_says_what_the_rest_needs(question: str) -> None:
    needs, ask = QUESTIONS[question]
    lone = LayerGraph.from_flows({"loss": 1.0}, {})
    for measured in (residual(0.5), severed(), residual(0.5).layers(), lone):
        graph = LayerGraph(topology(measured.record))
        names = list(graph)
        if needs == "flow":
            message = rf'^graph.{question} needs the flow .*detail="full"'
            with pytest.raises(GraphUnavailableError, match=message):
                ask(graph, names[-1], names[0])
        else:
            assert ask(graph, names[-1], names[0]) is not None


@pytest.mark.parametrize("question", [q for q in QUESTIONS if q not in NAMED])
def test_an_empty_graph_has_nothing_to_tell(question: str) -> None:
    answer = QUESTIONS[question][1](empty(), "", "")
    if isinstance(answer, tuple | list):
        assert len(answer) == 0


@pytest.mark.parametrize("question", NAMED)
def test_a_name_that_is_not_there(question: str) -> None:
    for graph in (empty(), residual(0.5)):
        for pair in (("loss", "nowhere"), ("nowhere", "loss")):
            with pytest.raises(UnknownLayerError, match="no entry named"):
                QUESTIONS[question][1](graph, *pair)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kind", GRAPHS)
def test_every_question_answers_every_measured_graph(kind: str, question: str) -> None:
    graph = GRAPHS[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in graph:
            QUESTIONS[question][1](graph, "loss", name)


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_node_to_itself_keeps_all(kind: str) -> None:
    graph = GRAPHS[kind]()
    for name in graph:
        assert graph.path(name, name).nodes == (name,)
        assert graph.transmission(name, name) == 1.0


def test_exchanged_names_are_an_error_where_the_direction_matters() -> None:
    graph = residual(0.5)
    assert graph.path("a", "loss").nodes == tuple(reversed(graph.path("loss", "a").nodes))
    message = r"^graph.transmission: 'a' feeds 'loss'.*transmission\('loss', 'a'\)"
    with pytest.raises(ValueError, match=message):
        graph.transmission("a", "loss")


def test_what_a_step_lacks_changes_nothing_in_that_step() -> None:
    graph = steps()
    assert graph.numbers.coherence[0].tolist() == [1.0, 1.0]  # at each step a has one consumer
    assert graph.transmission("loss", "a") == pytest.approx(math.sqrt(2.0 * 3.0))
    for place, (name, norm) in enumerate((("c", 2.0), ("b", 3.0))):
        alone = LayerGraph.from_flows(
            {"a": norm, name: norm, "loss": 1.0}, {("a", name): norm, (name, "loss"): norm}
        )
        one = graph.step(place)
        assert one.transmission("loss", "a") == alone.transmission("loss", "a") == pytest.approx(norm)
        assert one["a"].coherence == alone["a"].coherence == 1.0
        assert one.path("loss", "a").nodes == alone.path("loss", "a").nodes
        for a, b in ((one.layers(), alone.layers()), (one.at(depth=1), alone.at(depth=1))):
            for u, v in b.edges:
                assert a.edge(u, v).flow == pytest.approx(b.edge(u, v).flow)


def test_parts_that_a_step_lacks_add_nothing_to_a_joined_edge() -> None:
    nan = float("nan")
    graph = LayerGraph.from_flows(  # from a to c by two operations, of which the second step has one
        {"a": [5.0, 2.0], "p": [3.0, 2.0], "q": [4.0, nan], "c": [1.0, 1.0], "loss": [1.0, 1.0]},
        {
            ("a", "p"): [3.0, 2.0],
            ("a", "q"): [4.0, nan],
            ("p", "c"): [3.0, 2.0],
            ("q", "c"): [4.0, nan],
            ("c", "loss"): [1.0, 1.0],
        },
        ops=("p", "q"),
    )
    joined = graph.layers()
    assert np.allclose(joined.numbers.flow[joined.edges.index(("a", "c"))], [5.0, 2.0])


def test_comparing_what_was_not_measured_speaks_of_structure_alone() -> None:
    one = LayerGraph(topology(residual(0.5).record))
    two = LayerGraph(topology(LayerGraph.from_flows({"a": 1.0, "loss": 1.0}, {("a", "loss"): 1.0}).record))
    text = str(one.compare(two))
    assert text.splitlines() == [
        "only the structure was compared: no gradient norm is known of a node in both",
        "only before: fc, add",
        "edges only before: a -> fc, a -> add, fc -> add, add -> loss",
        "edges only after: a -> loss",
    ]
    assert "nan" not in str(residual(0.5).compare(residual(0.1)))  # `a` has no gain, and is told without one
    flows = {("a", "loss"): 1.0}
    gone = LayerGraph.from_flows({"a": 1.0, "loss": 1.0}, flows).compare(
        LayerGraph.from_flows({"a": 0.0, "loss": 1.0}, {("a", "loss"): 0.0})
    )
    assert "a: its gradient is exactly zero in one of the two, and not in the other" in str(gone)
