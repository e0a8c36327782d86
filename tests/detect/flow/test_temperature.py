"""Scores over a temperature that makes a softmax flat, or sure, before anything is learned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


class Scores(nn.Module):
    """Scores, or likenesses to a direction for each class, over a temperature that is a parameter or not."""

    def __init__(self, temperature: float, *, cosine: bool, learned: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 4))
        self.classes = nn.Parameter(torch.randn(4, 4)) if cosine else None
        value = torch.tensor(temperature)
        self.temperature = nn.Parameter(value) if learned else value

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        if self.classes is not None:
            y = F.normalize(y, dim=-1) @ F.normalize(self.classes, dim=-1).T
        return y / self.temperature


def told(model: nn.Module, seed: int = 0, inside: float = 1.0) -> set[tuple[object, str]]:
    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 8)
        return x, x[:, :4].argmax(1)

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores / inside, y)

    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    report = gf.diagnose(model, batch, loss, steps=12, optimizer=optimizer, seed=seed)
    return {(i.issue_type, i.layer) for i in report.issues if i.severity.is_serious}


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("cosine", "temperature"), [(True, 100.0), (False, 100.0), (False, 1e4)])
def test_a_softmax_that_stays_flat(cosine: bool, temperature: float, learned: bool) -> None:
    torch.manual_seed(0)
    found = told(Scores(temperature, cosine=cosine, learned=learned))
    assert (IssueType.VANISHING, "net.2") in found


def test_a_temperature_in_the_loss() -> None:
    torch.manual_seed(0)
    model = Scores(1.0, cosine=False, learned=False)
    assert (IssueType.VANISHING, "net.2") in told(model, inside=300.0)
    torch.manual_seed(0)
    assert told(Scores(1.0, cosine=False, learned=False), inside=1.0) == set()


@pytest.mark.parametrize(("cosine", "temperature"), [(True, 2e-3), (False, 5e-3)])
def test_a_softmax_that_is_sure_before_it_has_learned(cosine: bool, temperature: float) -> None:
    torch.manual_seed(0)
    found = told(Scores(temperature, cosine=cosine, learned=False))
    assert (IssueType.SATURATION, "net.2") in found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("cosine", "temperature", "learned"), [(True, 0.1, False), (False, 1.0, False), (False, 1.0, True)]
)
def test_usual_temperatures(cosine: bool, temperature: float, learned: bool, seed: int) -> None:
    torch.manual_seed(seed)
    assert told(Scores(temperature, cosine=cosine, learned=learned), seed) == set()


def test_small_weights_and_zeros_are_a_start() -> None:
    torch.manual_seed(0)
    model = Scores(1.0, cosine=False, learned=False)
    nn.init.normal_(model.get_parameter("net.2.weight"), std=1e-4)
    nn.init.zeros_(model.get_parameter("net.2.bias"))
    assert (IssueType.VANISHING, "net.2") not in told(model)
