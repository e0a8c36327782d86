"""Recurrent layers that run along the samples of the batch, and those that run along time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import Issue, IssueType

STEPS, SAMPLES = 9, 24


class Last(nn.Module):
    """A recurrent layer whose last step a linear layer reads."""

    def __init__(self, kind: Any, *, batch_first: bool, at: Any) -> None:
        super().__init__()
        self.rnn, self.head, self.at = kind(4, 16, batch_first=batch_first), nn.Linear(16, 3), at

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][self.at])


def told(model: nn.Module, x: Tensor, target: Tensor, **options: Any) -> list[Issue]:
    """Return what is said of layers that run along samples."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, lambda: (x, target), F.cross_entropy, steps=5, optimizer=optimizer, **options)
    return [
        i
        for i in report.issues
        if i.issue_type is IssueType.BOTTLENECK and "along the samples" in i.description
    ]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sick", [True, False])
def test_time_and_samples_that_are_exchanged(kind: Any, batch_first: bool, sick: bool) -> None:
    x = torch.randn(STEPS, SAMPLES, 4)
    at = -1  # of the first axis
    if batch_first != sick:  # the data have samples first
        x, at = x.transpose(0, 1), (slice(None), -1)
    issues = told(Last(kind, batch_first=batch_first, at=at), x, torch.randint(0, 3, (SAMPLES,)))
    assert [issue.layer for issue in issues] == (["rnn"] if sick else [])
    if sick:
        assert f"batch_first={not batch_first}" in issues[0].recommended_actions[0]


def test_a_pipeline_that_is_asked_for_tells_it_too() -> None:
    model = Last(nn.LSTM, batch_first=False, at=(slice(None), -1))
    x, target = torch.randn(SAMPLES, STEPS, 4), torch.randint(0, 3, (SAMPLES,))
    assert len(told(model, x, target, pipeline=gf.pipelines.recurrent())) == 1


@pytest.mark.parametrize(
    ("samples", "at"), [(1, (slice(None), 0)), (STEPS, (slice(None), -1)), (5, slice(None))]
)
def test_an_answer_for_every_step(samples: int, at: Any) -> None:
    """Of one sequence, of as many as there are steps, and of all."""
    model = Last(nn.LSTM, batch_first=False, at=at)
    target = torch.randint(0, 3, (STEPS,))
    if at == slice(None):
        model, target = nn.Sequential(model, nn.Flatten(0, 1)), target.repeat_interleave(samples)
    assert told(model, torch.randn(STEPS, samples, 4), target) == []
