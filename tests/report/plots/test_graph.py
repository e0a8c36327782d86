"""The drawing of the layer graph: places, widths, colours, and what it refuses."""

import itertools
import math
import sys

import pytest

from gradflow.errors import GraphUnavailableError
from gradflow.graph import LayerGraph
from gradflow.records import GraphRecord
from gradflow.report.layout import BOX_HEIGHT, ROW, graph_layout
from tests.graph.dags import edge, edges_of, network, node, residual, topology

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plots = pytest.importorskip("gradflow.report.plots.graph")
draw_graph = plots.draw_graph


def stream(blocks):
    """A stack of residual blocks with three layers in each branch, and a head."""
    edges, ops, last = [], set(), 0
    for i in range(blocks):
        one, two, three, add = range(4 * i + 1, 4 * i + 5)
        edges += [(last, one), (one, two), (two, three), (three, add), (last, add)]
        ops.add(add)
        last = add
    modules = {i: f"blocks.{(i - 1) // 4}.m{i}" for i in range(1, last + 1)} | {0: "stem"}
    return network([*edges, (last, last + 1)], ops=ops, modules=modules).graph


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("seed", range(12))
def test_no_box_overlaps_another_and_no_line_crosses_a_box(seed):
    graph = network(edges_of(seed, 14, 1.0), seed=seed).graph
    layout = graph_layout(graph)
    for a, b in itertools.combinations(graph, 2):
        (xa, ya, wa), (xb, yb, wb) = layout.box(a), layout.box(b)
        assert ya != yb or abs(xa - xb) >= (wa + wb) / 2
    for u, v in graph.edges:
        assert layout.places[u][1] - layout.places[v][1] >= ROW - 1e-9  # data runs down
        points, codes = layout.route(u, v)
        assert len(points) == len(codes)
        for other in set(graph) - {u, v}:
            x, y, width = layout.box(other)
            for (x0, y0), (x1, y1) in itertools.pairwise(points):
                for part in range(101):
                    at = (x0 + part / 100 * (x1 - x0), y0 + part / 100 * (y1 - y0))
                    assert not (abs(at[0] - x) < width / 2 and abs(at[1] - y) < BOX_HEIGHT / 2)


def test_skips_that_overlap_have_lanes_of_their_own():
    edges = [(i, i + 1) for i in range(8)] + [(0, 8), (1, 7), (2, 6), (0, 3), (3, 6)]
    lanes = graph_layout(network(edges, seed=1).graph).lanes
    assert lanes["n0", "n3"].x == lanes["n3", "n6"].x  # one ends where the other begins
    nested = [lanes["n2", "n6"].x, lanes["n1", "n7"].x, lanes["n0", "loss"].x]
    assert len(set(nested)) == 3
    assert nested == sorted(nested, key=abs)  # the longer span lies outside


def test_inputs_stand_just_above_what_reads_them():
    nodes = [
        node("input.0", "input"),
        node("a"),
        node("b"),
        node("input.1", "input"),
        node("c"),
        node("loss", "loss"),
    ]
    edges = [edge("input.0", "a"), edge("a", "b"), edge("b", "c"), edge("input.1", "c"), edge("c", "loss")]
    layout = graph_layout(LayerGraph(GraphRecord(nodes=nodes, edges=edges)))
    assert layout.places["input.1"][1] == layout.places["b"][1]
    assert layout.height == pytest.approx(4 * ROW + BOX_HEIGHT / 2)


def test_it_saves_a_picture_in_which_every_node_is_named(tmp_path):
    graph = stream(3)
    for ending in ("png", "svg"):
        figure = draw_graph(graph, tmp_path / f"graph.{ending}", level="full")
        assert (tmp_path / f"graph.{ending}").stat().st_size > 10_000
    assert set(graph) <= set(texts(figure))
    assert any(text.startswith("full; mean over 1 step; data runs down") for text in texts(figure))


def test_labels_lie_inside_their_boxes():
    figure = draw_graph(stream(2), level="full")
    figure.canvas.draw()
    axes = figure.axes[0]
    boxes = [p.get_window_extent() for p in axes.patches if type(p).__name__ == "FancyBboxPatch"]
    labels = [t.get_window_extent() for t in axes.texts if t.get_text().startswith(("n", "op"))]
    assert len(labels) >= len(boxes)
    for label in labels:
        assert any(b.x0 < label.x0 and label.x1 < b.x1 and b.y0 < label.y0 and label.y1 < b.y1 for b in boxes)


def test_layers_are_drawn_unless_asked_otherwise():
    graph = stream(2)
    assert not {"op4", "op8"} & set(texts(draw_graph(graph)))
    assert {"op4", "op8"} <= set(texts(draw_graph(graph, level="full")))
    assert {"blocks.0", "blocks.1"} <= set(texts(draw_graph(graph.at("blocks.*"))))


def test_a_large_graph_is_contracted_until_it_fits():
    figure = draw_graph(stream(30), max_nodes=40)
    assert {"n0", "blocks.0", "blocks.29", "loss"} <= set(texts(figure))
    assert any(text.startswith("folded;") for text in texts(figure))


def test_edges_are_as_wide_as_their_flow():
    widths = plots._widths([1.0, 1e-4, 1e-2, 0.0, math.nan])
    assert widths[0] == plots.MAX_WIDTH
    assert widths[1] == pytest.approx(plots.MIN_WIDTH)
    assert widths[2] == pytest.approx((plots.MAX_WIDTH + plots.MIN_WIDTH) / 2)
    assert widths[3] == widths[4] == plots.MIN_WIDTH
    assert plots._widths([1.0, 0.5])[1] > plots.MAX_WIDTH / 2  # alike within a factor of ten
    assert len(set(plots._widths([math.nan, 0.0]))) == 1


def test_the_colour_is_centred_on_a_gain_of_one():
    norm = plots._gain_norm(plots._matplotlib(), [0.1, 2.0, math.nan, 0.0])
    assert norm(1.0) == pytest.approx(0.5)
    assert (norm.vmin, norm.vmax) == (pytest.approx(0.1), pytest.approx(10.0))
    assert plots._gain_norm(plots._matplotlib(), [1.0]).vmax == pytest.approx(2.0)
    assert plots._gain_norm(plots._matplotlib(), [1e-30]).vmax == pytest.approx(1e3)


def test_severed_edges_say_so():
    nodes = [node("a"), node("b"), node("loss", "loss")]
    edges = [edge("a", "b", severed=True, reason="argmax"), edge("b", "loss")]
    figure = draw_graph(LayerGraph(GraphRecord(nodes=nodes, edges=edges)))
    assert {"argmax", "severed: carries no gradient"} <= set(texts(figure))
    assert len(figure.axes) == 1  # nothing measured: no colour bar
    assert "exactly zero" in texts(draw_graph(residual(0.0)))
    dashed = [
        p for p in figure.axes[0].patches if p.get_linestyle() == "--" or isinstance(p.get_linestyle(), tuple)
    ]
    assert len(dashed) == 2  # the edge, and the frame of the layer that nothing reaches


def test_a_graph_without_flows_and_long_names_and_an_empty_one():
    graph = LayerGraph(topology(stream(2).record))
    assert "topology only" in " ".join(texts(draw_graph(graph)))
    name = "encoder.layers.0.self_attention.output.projection"
    long = LayerGraph.from_flows({name: 1.0, "loss": 1.0}, {(name, "loss"): 1.0})
    assert "…" + name[-33:] in texts(draw_graph(long))
    assert draw_graph(LayerGraph(GraphRecord(nodes=[], edges=[])))


def test_into_axes_that_are_there():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    ax = figure.add_subplot()
    assert draw_graph(residual(0.5), ax=ax) is figure
    sizes = {text.get_fontsize() for text in ax.texts}
    assert max(sizes) < 9  # shrunk with the boxes
    part = figure.subfigures()
    assert draw_graph(residual(0.5), ax=part.add_subplot()) is figure


def test_what_it_refuses(monkeypatch):
    with pytest.raises(ValueError, match="expected level 'layers' or 'full', got 'ops'"):
        draw_graph(residual(0.5), level="ops")
    flows = {(f"input.{i}", "loss"): 1.0 for i in range(9)}
    inputs = LayerGraph.from_flows({name: 1.0 for name, _ in flows} | {"loss": 1.0}, flows)
    with pytest.raises(ValueError, match=r"folded into few blocks still more than max_nodes=3"):
        draw_graph(inputs, max_nodes=3)
    flows = {("c.a", "m.b"): 1.0, ("m.b", "c.c"): 1.0, ("c.c", "loss"): 1.0}
    cyclic = LayerGraph.from_flows({"c.a": 1.0, "m.b": 1.0, "c.c": 1.0, "loss": 1.0}, flows).at(depth=1)
    with pytest.raises(GraphUnavailableError, match="draw_graph needs a graph without cycles"):
        draw_graph(cyclic)
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(
        ImportError, match=r'draw_graph needs matplotlib.*pip install "gradient-flow\[plot\]"'
    ):
        draw_graph(residual(0.5))


def test_a_figure_says_what_it_folded():
    graph = stream(30)
    for level, asked in (("full", graph), ("layers", plots._contracted(graph))):
        figure = draw_graph(graph, level=level, max_nodes=40)
        (text,) = [text for text in texts(figure) if "asked for" in text]
        assert text.startswith(
            f"{len(asked)} nodes ({level}) were asked for and are folded to 32, 30 of them"
        )
        assert f"max_nodes={len(asked)} draws all" in text
        whole = draw_graph(graph, level=level, max_nodes=len(asked))
        assert not [text for text in texts(whole) if "asked for" in text]


def test_a_long_stream_keeps_its_sums_and_a_short_one_does_not():
    assert "op4" not in texts(draw_graph(stream(2)))
    long = plots._contracted(stream(30))
    assert len(long.edges) < 4 * len(long)
    assert len(stream(30).layers().edges) > 400


def test_names_are_no_mathematics_and_axes_are_of_one_plot(tmp_path):
    graph = LayerGraph.from_flows({"$x_{1$": 0.0, "loss": 1.0}, {("$x_{1$", "loss"): 0.0})
    figure = graph.draw(tmp_path / "odd.png")
    assert "$x_{1$" in [text.get_text() for text in figure.axes[0].texts]
    with pytest.raises(TypeError, match="draw_graph: expected ax .* got ndarray"):
        graph.draw(ax=figure.subplots(1, 2))
    with pytest.raises(
        TypeError, match="draw_graph: expected a LayerGraph, such as record.graph, got DiGraph"
    ):
        draw_graph(graph.nx)
