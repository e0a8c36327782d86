"""Rows that a model gives one answer for, and the loss pulls apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import copied_rows
from gradflow.records import FlowRecord, IssueType, RowsRecord


class Cells(nn.Module):
    """Observations to cells, and back: with the observations' own features, or without."""

    def __init__(self, seeded: bool) -> None:
        super().__init__()
        self.encoder, self.seeded = nn.Linear(4, 16), seeded
        self.decoder = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        own = self.encoder(x)
        cells = own.unflatten(1, (4, 6)).mean(2).repeat_interleave(6, 1)
        return x + self.decoder(torch.cat([own if self.seeded else torch.zeros_like(own), cells], -1))


class Queries(nn.Module):
    """Slots that read a set, by queries that are drawn, or zeros for good."""

    def __init__(self, drawn: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(6, 16)) if drawn else torch.zeros(6, 16)
        self.keys, self.values, self.out = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.queries @ self.keys(x).mT / 4).softmax(-1)
        return self.out(self.queries + weights @ self.values(x))


def record_of(model: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]]) -> FlowRecord:
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    return gf.analyze(model, batch, F.mse_loss, steps=6, optimizer=optimizer, seed=0)


def weather() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 24, 4)
    return x, torch.sin(2 * x)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("seeded", [True, False])
def test_observations_of_a_cell_that_get_one_answer(seeded: bool, seed: int) -> None:
    torch.manual_seed(seed)
    record = record_of(Cells(seeded), weather)
    found = gf.detect(record, copied_rows())
    assert [(i.layer, i.issue_type) for i in found] == (
        [] if seeded else [("decoder.2", IssueType.BOTTLENECK)]
    )
    if not seeded:
        (rows,) = record.parts.rows
        assert (rows.num_rows, rows.num_different) == (24, 4)
        assert 0.7 < rows.torn_share < 1  # five sixths of what has nothing to do with the cell


@pytest.mark.parametrize("drawn", [True, False])
def test_queries_that_are_all_zero(drawn: bool) -> None:
    torch.manual_seed(0)
    wanted = torch.randn(6, 4)
    record = record_of(Queries(drawn), lambda: (torch.randn(16, 10, 4), wanted.expand(16, 6, 4)))
    assert bool(gf.detect(record, copied_rows())) is not drawn


def test_rows_that_are_to_get_one_answer_and_repeated_inputs() -> None:
    torch.manual_seed(0)
    record = record_of(Cells(False), lambda: (torch.randn(8, 24, 4), torch.ones(8, 24, 4)))
    assert all(rows.torn_share >= 0 for rows in record.parts.rows)
    tokens = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 4))
    seen = record_of(tokens, lambda: (torch.randint(3, (8, 24)), torch.randn(8, 24, 4)))
    assert seen.parts.rows == ()


def test_a_head_that_starts_at_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.init.zeros_(model.get_parameter("2.weight"))
    record = record_of(model, weather)
    assert gf.detect(record, copied_rows()) == ()


def test_what_cancels_between_equal_rows() -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.ones_(model.bias)
    pull = torch.tensor([[[1.0, 0.0], [1.0, 2.0]], [[3.0, 0.0], [3.0, 0.0]]])
    record = gf.analyze(model, [torch.randn(2, 2, 2)], lambda y: (y * pull).sum())
    kept = (4 + 4) / 2 + 36 / 2  # the sums are (2, 2) and (6, 0)
    (rows,) = record.parts.rows
    assert rows.torn_share == pytest.approx(1 - kept / float(pull.square().sum()))
    assert rows == RowsRecord(layer="", num_rows=2, num_different=1.0, torn_share=rows.torn_share)
    assert FlowRecord.from_json(record.to_json()).parts.rows == record.parts.rows


class Slots(nn.Module):
    """Queries that the model itself owns look into a sequence, and each gives a box."""

    def __init__(self, clones: bool, norm: bool, anchors: bool = False) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1 if clones else 4, 16))
        self.anchors = nn.Parameter(torch.randn(1, 4, 2)) if anchors else None
        self.keys, self.values = nn.Linear(3, 16), nn.Linear(3, 16)
        self.norm = nn.LayerNorm(16) if norm else nn.Identity()
        self.mix, self.box = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        query = self.norm(self.query.expand(len(x), 4, -1))
        seen = (query @ self.keys(x).mT / 4).softmax(-1) @ self.values(x)
        boxes = self.box(torch.relu(self.mix(query + seen)))
        return boxes if self.anchors is None else boxes + self.anchors


def found_in(model: Slots, wanted: Tensor) -> list[str]:
    record = record_of(model, lambda: (torch.randn(16, 10, 3), wanted.expand(16, 4, 2)))
    return [i.layer for i in gf.detect(record, copied_rows())]


@pytest.mark.parametrize("norm", [True, False])
def test_queries_that_are_copies_are_told_where_they_come_in(norm: bool) -> None:
    torch.manual_seed(0)
    wanted = torch.randn(4, 2)
    assert found_in(Slots(clones=True, norm=norm), wanted) == ["norm"]
    assert found_in(Slots(clones=False, norm=norm), wanted) == []


def test_slots_that_something_behind_the_last_layer_or_nothing_tells_apart() -> None:
    torch.manual_seed(0)
    assert found_in(Slots(clones=True, norm=True, anchors=True), torch.randn(4, 2)) == []
    assert found_in(Slots(clones=True, norm=True), torch.randn(1, 2)) == []
