"""Folding: what becomes one node, and that edges stay linear in the depth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.graph import LayerGraph
from tests.report.html.test_folding import Deep


def graph_of(depth: int) -> LayerGraph:
    torch.manual_seed(0)
    batch = torch.randn(16, 8), torch.randint(0, 2, (16,))
    return gf.layer_graph(Deep(depth), batch, nn.CrossEntropyLoss())


def test_residual_sums_outside_of_blocks_are_kept_and_edges_stay_linear() -> None:
    for depth in (8, 16):
        graph = graph_of(depth)
        folded = graph.fold()
        kinds = [folded[name].kind for name in folded]
        assert kinds.count("block") == depth
        assert kinds.count("op") == depth - 1  # the last sum is read by the head alone
        assert len(folded.edges) <= 3 * depth + 3
        assert len(graph.layers().edges) > depth * depth / 2
        assert folded.table.topo is not None
        assert folded.transmission("loss", "stem") == pytest.approx(graph.transmission("loss", "stem"))


@pytest.mark.parametrize("most", [1, 3, 7])
def test_there_are_no_more_boxes_than_asked_for(most: int) -> None:
    folded = graph_of(12).fold(most=most)
    assert sum(folded[name].kind in ("block", "layer") for name in folded) <= most


def test_what_is_repeated_elsewhere_stands_alone() -> None:
    graph = graph_of(3)
    assert list(graph.fold(most=2))[1:3] != list(graph.fold())[1:3]
    with pytest.raises(
        ValueError, match=r"^graph.fold: expected most to be a whole number of at least 1, got 0"
    ):
        graph.fold(most=0)
    with pytest.raises(ValueError, match=r"whole number of at least 1, got 1\.5"):
        graph.fold(most=1.5)  # type: ignore[arg-type]
