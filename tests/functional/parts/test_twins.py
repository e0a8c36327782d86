"""Slices that are equal to the bit, against a slow comparison, and the distance of their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional.parts.twins import apart, equal_rows, is_same, twins


def different(rows: Tensor) -> int:
    """Return how many kinds of rows there are; rows of zeros are counted one by one."""
    seen: set[tuple[float, ...]] = set()
    zeros = 0
    for row in rows.flatten(1).tolist():
        zeros += not any(row)
        seen.update({tuple(row)} if any(row) else ())
    return len(seen) + zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12, 5), (12, 40), (12, 3, 2, 2)])
def test_equal_rows_are_those_of_a_slow_comparison(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.manual_seed(0)
    for kinds in (1, 2, 5, 6, 7, 12):
        rows = torch.randn(shape, generator=g)[torch.arange(12) % kinds].to(dtype)
        expected = different(rows)
        found = [t for t in twins(rows) if t.axis == 0]
        assert [t.num_different for t in found] == ([expected] if expected <= 6 else [])


def test_rows_that_differ_behind_the_first_elements_are_told_apart() -> None:
    rows = torch.zeros(6, 100)
    rows[:, 0] = 1.0
    rows[torch.arange(6), 50 + torch.arange(6)] = 1.0
    assert [t.axis for t in twins(rows)] == []


def test_rows_whose_elements_are_exchanged_are_told_apart() -> None:
    rows = torch.stack([torch.arange(1.0, 9.0).roll(i) for i in range(8)])
    assert twins(rows) == []


def test_zeros_of_both_signs_are_no_copies() -> None:
    assert twins(torch.zeros(8, 8)) == []
    assert twins(-torch.zeros(8, 8)) == []


def test_columns_are_looked_at_too() -> None:
    rows = torch.randn(6, 1, generator=torch.manual_seed(0)).expand(6, 4)
    assert [(t.axis, t.num_different) for t in twins(rows)] == [(1, 1)]


def test_the_distance_of_gradients_is_the_largest_within_equal_slices() -> None:
    weight = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]])
    (found,) = (t for t in twins(weight) if t.axis == 0)
    gradient = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert float(apart(found, gradient)) == pytest.approx(1.0)
    gradient[3] = torch.tensor([3.0, 4.5])
    assert float(apart(found, gradient)) == pytest.approx(0.5 / math.hypot(3.0, 4.5))
    assert math.isnan(apart(found, torch.zeros(4, 2)))


def test_a_run_tells_whether_the_gradient_is_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    for layer, value in ((net[0], 0.3), (net[2], 0.2)):
        nn.init.constant_(layer.get_parameter("weight"), value)
        nn.init.zeros_(layer.get_parameter("bias"))
    record = gf.analyze(net, lambda: torch.randn(16, 4), lambda y: y.square().mean(), steps=1)
    found = {(t.name, t.axis): t for t in record.parts.twins}
    assert set(found) == {("0.weight", 0), ("0.weight", 1), ("2.weight", 0), ("2.weight", 1)}
    assert found["0.weight", 0].gradient_apart < 1e-6
    assert found["2.weight", 0].gradient_apart > 1e-2  # the head tells its units apart


def test_a_tensor_over_the_same_numbers_is_the_same() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert is_same(x, x)
    assert is_same(x.view_as(x), x)
    assert not is_same(x.clone(), x)
    assert not is_same(x.view(3, 2), x)
    assert not is_same(x.to_sparse(), x)
    assert not is_same(None, x)


def test_what_rows_of_one_kind_lose_in_their_mean() -> None:
    torch.manual_seed(0)
    kinds = torch.tensor([[0, 0, 1], [2, 3, 3]])
    rows = equal_rows(torch.randn(4, 5)[kinds] + torch.zeros(2, 3, 5))
    assert rows is None  # four of six differ
    kinds = torch.tensor([[0, 0, 0, 1], [2, 3, 3, 3]])
    rows = equal_rows(torch.randn(4, 5)[kinds])
    assert rows is not None
    values = torch.randn(2, 4, 7)
    lost = torch.zeros(())
    for kind in range(4):
        of_kind = values[kinds == kind]
        lost += (of_kind - of_kind.mean(0)).square().sum()
    assert rows.fits(values)
    assert not rows.fits(values[:, :3])
    assert float(rows.lost(values)) == pytest.approx(float(lost / values.square().sum()), rel=1e-5)


class Decoder(nn.Module):
    """Slots that enter alike or apart, and pass two layers; the model owns their table itself."""

    def __init__(self, *, blind: bool) -> None:
        super().__init__()
        self.table, self.blind = nn.Parameter(torch.randn(1, 4, 8)), blind
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.table + x[:, :1]
        if not self.blind:
            return self.last(self.first(slots[:, :1].expand(-1, 4, -1)))
        return self.last(self.first(slots).mean(1, keepdim=True).expand(-1, 4, -1))


@pytest.mark.parametrize(("blind", "since", "start"), [(False, "first", True), (True, "last", False)])
def test_the_layer_from_which_on_rows_are_equal(blind: bool, since: str, start: bool) -> None:
    torch.manual_seed(0)
    model, wanted = Decoder(blind=blind), torch.randn(16, 4, 2)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    batch = lambda: torch.randn(16, 9, 8)  # noqa: E731
    record = gf.analyze(model, batch, lambda y: (y - wanted).square().mean(), steps=4, optimizer=adam)
    (rows,) = record.parts.rows
    assert (rows.layer, rows.since, rows.from_the_start) == ("last", since, start)
