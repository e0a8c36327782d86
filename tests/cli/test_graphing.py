"""`gradflow graph`: its answers are those of the graph's own queries."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.graph import LayerGraph
from gradflow.records import NAN
from gradflow.report.text.graph import bottlenecks_text, cut_text, graph_text, path_text
from tests.cli.running import run, write


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
    gf.analyze(model, [torch.ones(2, 4)], lambda y: y.sum(), detail="full").to_json(tmp_path / "flow.json")
    return tmp_path / "flow.json"


def test_a_look_at_the_whole_of_what_a_file_builds(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "graph", f"{file}:dead", "--seed", 0)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("LayerGraph(full: ")
    assert lines[0].endswith("1 step measured)")
    assert "Severed edges:" in lines
    assert any(
        line.startswith("  0: the gradient on its way from the loss is exactly zero") for line in lines
    )


def test_answers_are_those_of_the_graph(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = gf.FlowRecord.from_json(saved).graph
    status, out, _ = run(capsys, "graph", saved, "--bottlenecks", 3, "--path", "loss", "0")
    path = graph.path("loss", "0")
    assert (status, out) == (0, f"{bottlenecks_text(graph.bottlenecks(3))}\n\n{path_text(path)}\n")
    assert [line.split()[0] for line in path_text(path).splitlines()[2:]] == list(path.nodes)
    assert run(capsys, "graph", saved)[1] == graph_text(graph) + "\n"
    assert run(capsys, "graph", saved, "--bottlenecks")[1] == bottlenecks_text(graph.bottlenecks()) + "\n"


def test_a_record_in_an_archive_is_read_as_one_in_json(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = saved.with_suffix(".npz")
    gf.FlowRecord.from_json(saved).to_npz(archive)
    for command in ("graph", "show"):
        assert run(capsys, command, archive) == run(capsys, command, saved)
    archive.write_bytes(b"PK")
    status, _, err = run(capsys, "show", archive)
    assert (status, "cannot read" in err, "expected a NumPy archive" in err) == (2, True, True)


def test_cuts_weakest_paths_and_bottlenecks_between_two_nodes(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = gf.FlowRecord.from_json(saved).graph
    between = bottlenecks_text(graph.bottlenecks(source="1.1", target="0"))
    weakest = f"Weakest path {path_text(graph.weakest_path('loss', '0'))}"
    cut = cut_text(graph.minimum_cut("loss", "0"))
    asked = ("--from", "1.1", "--to", "0", "--weakest", "loss", "0", "--cut", "loss", "0")
    assert run(capsys, "graph", saved, *asked)[:2] == (0, f"{between}\n\n{weakest}\n\n{cut}\n")
    first = bottlenecks_text(graph.bottlenecks(1, target="0"))
    assert run(capsys, "graph", saved, "--bottlenecks", 1, "--to", "0")[1] == first + "\n"


@pytest.mark.parametrize("level", ["layers", "1", "2", "1.*"])
def test_levels(saved: Path, capsys: pytest.CaptureFixture[str], level: str) -> None:
    graph = gf.FlowRecord.from_json(saved).graph
    coarse = {
        "layers": graph.layers(),
        "1": graph.at(depth=1),
        "2": graph.at(depth=2),
        "1.*": graph.at("1.*"),
    }
    assert run(capsys, "graph", saved, "--at", level)[1].splitlines()[0] == repr(coarse[level])


def test_exports_are_what_others_read(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = gf.FlowRecord.from_json(saved).graph
    paths = {ending: tmp_path / f"graph{ending}" for ending in (".graphml", ".dot", ".json")}
    for path in paths.values():
        status, out, _ = run(capsys, "graph", saved, "--export", path)
        assert (status, out) == (0, f"{graph!r} written to {path}\n")
    assert set(nx.read_graphml(paths[".graphml"]).edges) == set(graph.nx.edges)
    read = nx.node_link_graph(json.loads(paths[".json"].read_text()), edges="edges")
    assert set(read.edges) == set(graph.nx.edges)
    assert paths[".dot"].read_text() == graph.to_dot() + "\n"
    status, _, err = run(capsys, "graph", saved, "--export", tmp_path / "graph.png")
    assert status == 2
    assert "expected a name that ends in .graphml, .dot, .json" in err


def test_what_cannot_be_answered_is_one_clear_line(
    file: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap = tmp_path / "cheap.json"
    gf.analyze(nn.Linear(2, 2), [torch.ones(1, 2)], lambda y: y.sum()).to_json(cheap)
    for arguments, told in (
        ((saved, "--path", "loss", "9"), "cannot answer that: no entry named '9'. The nearest of "),
        ((cheap, "--bottlenecks"), "needs the flow on the edges, but this graph holds only the topology"),
        ((saved, "--cut", "loss", "loss"), "'loss' was given twice"),
        ((saved, "--from", "0", "--to", "loss"), "'0' feeds 'loss'"),
        ((saved, "--at", "²"), "'²'"),
        ((f"{file}:broken",), "the graph of "),
        ((tmp_path / "none.json",), "there is no file "),
    ):
        status, out, err = run(capsys, "graph", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert told in err
    assert "The flow was not measured" in run(capsys, "graph", cheap)[1]


def test_texts_of_what_is_not_there() -> None:
    graph = LayerGraph.from_flows({"a": 0.0, "b": 1.0, "loss": 1.0}, {("a", "b"): 0.0, ("b", "loss"): 1.0})
    assert path_text(graph.path("loss", "a")).startswith("loss .. a: no gradient comes from loss back to a: ")
    assert "Severed edges:\n  a -> b\nOut of reach:\n  a: the gradient" in graph_text(graph)
    many = LayerGraph.from_flows(
        {**{f"a{i}": 0.0 for i in range(12)}, "loss": 1.0}, {(f"a{i}", "loss"): 0.0 for i in range(12)}
    )
    assert "  a7 -> loss\n  ... and 4 more\n" in graph_text(many)
    unknown = LayerGraph.from_flows({"a": NAN, "loss": 1.0}, {("a", "loss"): NAN})
    assert "\nNo finite gradient, so not judged:\n  a\n" in graph_text(unknown)
    plain = LayerGraph.from_flows({"a": 2.0, "loss": 1.0}, {("a", "loss"): 2.0})
    assert path_text(plain.path("loss", "a")).splitlines()[-1].split() == ["a", "2", "–", "2"]
    assert NAN != plain["loss"].gain == 2.0
    parted = LayerGraph.from_flows({"a": 2.0, "b": 2.0, "loss": 2.0}, {("a", "loss"): 0.5})
    assert cut_text(parted.minimum_cut("loss", "a")).splitlines() == [
        "loss .. a: 0.25 of the gradient can cross:",
        "  a -> loss: 0.5",
    ]
    assert cut_text(parted.minimum_cut("loss", "b")).endswith("no way leads from one to the other.")
