"""The picture: what its boxes hold, what flows between them, and where its lines run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.records import FlowRecord, LayerRecord
from gradflow.report.html.folding import MAX_LANES, Line, laned, picture, runs_of
from tests.samples import chain_record, layer_record


class Deep(nn.Module):
    """Residual blocks added outside of themselves, so that every sum belongs to no block."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def record_of(depth: int, detail: str = "cheap") -> FlowRecord:
    torch.manual_seed(0)
    data = lambda: (torch.randn(16, 8), torch.randint(0, 2, (16,)))  # noqa: E731
    return gf.analyze(Deep(depth), data, nn.CrossEntropyLoss(), steps=2, detail=detail)  # type: ignore[arg-type]


def layers(*names: str) -> list[LayerRecord]:
    return [layer_record(name, [1.0], order=i) for i, name in enumerate(names)]


def test_entries_of_lists_are_boxes_and_other_layers_stand_alone() -> None:
    found = runs_of(layers("emb", "h.0.a", "h.0.b", "h.1.a", "h.1.b", "head"), 32)
    assert {name: len(calls) for name, calls in found.items()} == {"emb": 1, "h.0": 2, "h.1": 2, "head": 1}


@pytest.mark.parametrize(("depth", "most"), [(10, 12), (48, 32), (1000, 32), (1000, 5)])
def test_too_many_are_runs_that_hold_every_call_once_in_order(depth: int, most: int) -> None:
    every = layers("emb", *(f"h.{i}.{part}" for i in range(depth) for part in "ab"), "norm", "head")
    found = runs_of(every, most)
    assert len(found) <= most
    assert [call for calls in found.values() for call in calls] == every
    if depth == 48:
        assert list(found)[:2] == ["emb", "h.0 … 1"]


@pytest.mark.parametrize("most", [1, 3, 7])
def test_names_without_lists_fold_as_well(most: int) -> None:
    assert len(runs_of(layers(*(f"part{i}.fc" for i in range(40))), most)) <= most


@pytest.mark.parametrize("depth", [3, 60])
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_a_deep_model_has_few_boxes_and_lines_linear_in_them(depth: int, detail: str) -> None:
    record = record_of(depth, detail)
    drawn = picture(record)
    assert drawn.measured is (detail == "full")
    layers_in = [call.name for box in drawn.boxes for call in box.members]
    assert sorted(layers_in) == sorted(layer.name for layer in record)
    assert sum(bool(box.members) for box in drawn.boxes) <= 32
    assert len(drawn.lines) <= 5 * len(drawn.boxes)
    assert drawn.boxes[-1].kind == "loss"
    assert all(0 <= line.lane <= MAX_LANES for line in drawn.lines)
    assert all(line.flow > 0 for line in drawn.lines if drawn.boxes[line.source].kind == "block")


def test_what_is_estimated_is_what_is_measured_on_a_chain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    data = [(torch.randn(16, 8), torch.randint(0, 2, (16,)))]
    flows, gains = [], []
    for detail in ("cheap", "full"):
        drawn = picture(gf.analyze(model, data, nn.CrossEntropyLoss(), steps=1, detail=detail))
        flows.append([line.flow for line in drawn.lines if drawn.boxes[line.source].kind == "layer"])
        gains.append([box.gain for box in drawn.boxes if box.name in ("1", "2", "3", "4")])
    assert flows[0] == pytest.approx(flows[1], rel=1e-5)
    assert gains[0] == pytest.approx(gains[1], rel=1e-5)


def test_without_a_graph_the_layers_are_a_chain() -> None:
    drawn = picture(chain_record(4))
    assert [box.name for box in drawn.boxes] == ["fc1", "fc2", "fc3", "fc4"]
    assert [(line.source, line.target) for line in drawn.lines] == [(0, 1), (1, 2), (2, 3)]
    assert drawn.boxes[1].gain == pytest.approx(1e-2)
    assert math.isnan(drawn.boxes[0].gain)
    assert picture(FlowRecord(steps=0, losses=[], layers=(), parameters=())).boxes == ()


def test_lines_beside_boxes_do_not_lie_on_one_another() -> None:
    spans = [(0, 1), (0, 4), (1, 3), (3, 6), (4, 6), (5, 2)]
    found = laned([Line(u, v, 1.0, False, "") for u, v in spans])
    assert [line.lane == 0 for line in found] == [v - u == 1 for u, v in spans]
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            if a.lane == b.lane != 0:
                low, high = (
                    max(min(a.source, a.target), min(b.source, b.target)),
                    min(max(a.source, a.target), max(b.source, b.target)),
                )
                assert low >= high
