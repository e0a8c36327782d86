"""VANISHING over time where the data tell that it matters: what is asked for is told out of reach."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.functional.recurrent.cotangents import _alike, tells
from gradflow.records import Issue, IssueSeverity

KINDS = 3


class Reader(nn.Module):
    """Reads a sequence and answers from its last state."""

    def __init__(self, layer: nn.Module, *, keep: float = 0.0, loop: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.loop = layer, nn.Linear(24, KINDS), loop
        if keep:
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    if "bias" in name:
                        parameter[24:48] = keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.loop:
            return self.head(self.layer(x)[0][:, -1])
        state = None
        for step in x.unbind(1):
            state = self.layer(step, state)
        assert isinstance(state, Tensor)
        return self.head(state)


def told(model: nn.Module, where: str, steps: int = 64, *, strength: float = 1.5) -> list[Issue]:
    """Return the verdicts on a run in which the class is told at some part of the sequence."""
    draw = torch.Generator().manual_seed(5)
    part = {"start": slice(0, 12), "end": slice(-12, None), "all": slice(None), "nowhere": slice(0, 0)}[where]
    shapes = strength * torch.randn(KINDS, steps, 4, generator=draw)
    now: list[Tensor] = []

    def batch() -> Tensor:
        now[:] = [torch.randint(0, KINDS, (32,), generator=draw)]
        x = 0.5 * torch.randn(32, steps, 4, generator=draw)
        x[:, part] += shapes[now[0]][:, part]
        return x

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    report = gf.diagnose(model, batch, lambda y: F.cross_entropy(y, now[0]), optimizer=optimizer)
    return [issue for issue in report.issues if "told_faint" in issue.metrics]


SICK: list[Any] = [
    lambda: Reader(nn.LSTM(4, 24, batch_first=True)),
    lambda: Reader(nn.GRU(4, 24, batch_first=True)),
    lambda: Reader(nn.LSTM(4, 24, 2, batch_first=True)),
    lambda: Reader(nn.RNN(4, 24, batch_first=True)),
    lambda: Reader(nn.GRUCell(4, 24), loop=True),
]


@pytest.mark.parametrize("make", SICK)
def test_what_is_told_at_the_start_alone_is_out_of_reach(make: Any) -> None:
    torch.manual_seed(0)
    (issue,) = told(make(), "start")
    assert issue.severity is IssueSeverity.HIGH
    plain = issue.layer_type == "RNN"  # of which the graver verdict on its weights comes first
    assert plain or "is told at steps that teach it nothing" in issue.description
    assert issue.metrics["told_heard"] < 2 < 4 < issue.metrics["told_faint"]


@pytest.mark.parametrize("where", ["end", "all", "nowhere"])
@pytest.mark.parametrize("make", SICK[:2])
def test_a_short_memory_is_no_illness_where_the_data_ask_for_no_other(make: Any, where: str) -> None:
    torch.manual_seed(0)
    assert not told(make(), where)


def test_weakly_told_at_the_end_so_that_the_model_guesses() -> None:
    torch.manual_seed(0)
    assert not told(Reader(nn.LSTM(4, 24, batch_first=True)), "end", strength=0.1)


@pytest.mark.parametrize("strength", [0.05, 0.15])
def test_a_little_at_every_step_of_a_long_sequence(strength: float) -> None:
    torch.manual_seed(0)
    assert not told(Reader(nn.LSTM(4, 24, batch_first=True)), "all", steps=160, strength=strength)


def test_a_layer_that_remembers() -> None:
    torch.manual_seed(0)
    assert not told(Reader(nn.LSTM(4, 24, batch_first=True), keep=2.0), "start")


def test_a_short_sequence_is_heard_as_a_whole() -> None:
    torch.manual_seed(0)
    assert not told(Reader(nn.LSTM(4, 24, batch_first=True)), "start", steps=14)


# ------------------------------------------------------------------------------------- the measure


def naive(x: Tensor, asked: Tensor, steps: list[int], order: list[int]) -> list[float]:
    """Return the dependence of inputs and answers at some steps, of samples in an order, by plain loops."""

    def gram(rows: np.ndarray) -> np.ndarray:
        rows = rows - rows.mean(0)
        found = np.array([[float(a @ b) for b in rows] for a in rows])
        return found / math.sqrt((found**2).sum())

    answers = gram(asked.double().numpy()[order])
    return [float((gram(x[t].double().numpy()) * answers).sum()) for t in steps]


def test_dependence_by_plain_loops() -> None:
    torch.manual_seed(0)
    x, asked = torch.randn(5, 9, 3), torch.randn(9, 2)
    found = torch.einsum("tij,ij->t", _alike(x), _alike(asked[None])[0])
    assert found.tolist() == pytest.approx(naive(x, asked, list(range(5)), list(range(9))))


def drive(steps: int, samples: int, heard: int) -> list[Tensor]:
    sizes = torch.where(torch.arange(steps) >= steps - heard, 1.0, 1e-8)
    return [sizes[:, None, None].expand(steps, samples, 2)]


@pytest.mark.parametrize("told_at", [2, 17])
def test_the_side_on_which_it_is_told(told_at: int) -> None:
    torch.manual_seed(1)
    asked, x = torch.randn(32, 2), torch.randn(20, 32, 3)
    x[told_at, :, :2] = asked + 0.1 * torch.randn(32, 2)
    heard, faint, share = tells(x, asked, drive(20, 32, 8))
    assert share == 0.4
    assert (faint > 4, heard > 4) == (told_at == 2, told_at == 17)


def test_of_inputs_that_tell_nothing_chance_is_normal() -> None:
    torch.manual_seed(2)
    found = [
        tells(torch.randn(30, 16, 2).cumsum(0), torch.randn(16, 1), drive(30, 16, 10)) for _ in range(60)
    ]
    faint = np.array([told.faint for told in found])
    assert abs(faint.mean() - 0.4) < 0.4
    assert faint.std() < 1.5
    assert faint.max() < 4


def test_nothing_is_known_of_few_samples_and_of_steps_that_are_all_heard() -> None:
    x, asked = torch.randn(20, 6, 3), torch.randn(6, 2)
    assert all(map(math.isnan, tells(x, asked, drive(20, 6, 8))))
    x, asked = torch.randn(20, 16, 3), torch.randn(16, 2)
    assert all(map(math.isnan, tells(x, asked, drive(20, 16, 20))))
    assert all(map(math.isnan, tells(x, asked, [torch.zeros(20, 16, 2)])))
