"""Terms of a loss that another one drowns, at weights that both train; inputs that positions drown."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType


class Tasks(nn.Module):
    """Two heads on a trunk that they share, or that each has for itself."""

    def __init__(self, *, shared: bool, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed
        self.trunks = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 64), nn.ReLU()) for _ in range(1 if shared else 2)
        )
        self.value, self.kind = nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, kind = self.value(self.trunks[0](x)), self.kind(self.trunks[-1](x))
        return (value + 1e-5 * kind, value + 1e-5 * kind) if self.mixed else (value, kind)


def sample() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(64, 10)
    return x, (x[:, :3] * x[:, 3:6], x[:, 6:9].argmax(1))


@pytest.mark.parametrize(
    ("weights", "weak"), [((1.0, 1e-6), {"kind"}), ((1e-6, 1.0), {"value"}), ((1.0, 0.1), set())]
)
def test_a_task_that_another_one_drowns_while_it_is_learned(
    weights: tuple[float, float], weak: set[str]
) -> None:
    """The loss falls to next to nothing of what guesses cost, and is the other term's alone."""
    torch.manual_seed(0)
    model = Tasks(shared=True, mixed=False)

    def easy() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = torch.randn(64, 10)
        return x, (x[:, :3], 1 + x[:, 6:7].sign().long()[:, 0])

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        value, kind = F.mse_loss(output[0], target[0]), F.cross_entropy(output[1], target[1])
        return weights[0] * value + weights[1] * kind

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    report = gf.diagnose(model, easy, loss, steps=40, optimizer=optimizer)
    known = report.record.knowledge
    assert known is not None
    assert known.share_left < 0.25
    assert {i.layer for i in report.issues if i.severity >= IssueSeverity.MEDIUM} == weak


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize(
    ("weights", "shared", "mixed", "weak"),
    [
        ((1.0, 1.0), True, False, set()),
        ((1.0, 1e-2), True, False, set()),
        ((1.0, 1e-6), True, False, {"kind"}),
        ((1e6, 1.0), True, False, {"kind"}),
        ((1e-6, 1.0), True, False, {"value"}),
        ((1.0, 1e-6), False, False, set()),
        ((1.0, 1.0), True, True, set()),
    ],
)
def test_a_task_whose_weight_is_next_to_nothing(
    weights: tuple[float, float], shared: bool, mixed: bool, weak: set[str], scale: float
) -> None:
    torch.manual_seed(0)
    model = Tasks(shared=shared, mixed=mixed)

    def loss(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        value, kind = F.mse_loss(outputs[0], targets[0]), F.cross_entropy(outputs[1], targets[1])
        return scale * (weights[0] * value + weights[1] * kind)

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, sample, loss, steps=8, optimizer=optimizer)
    serious = [i for i in report.issues if i.severity >= IssueSeverity.MEDIUM]
    assert {i.layer for i in serious if i.issue_type is IssueType.VANISHING} == weak


class Words(nn.Module):
    """Tells the word after each, from words and places; or from places that are no more than a number."""

    def __init__(self, places: float, words: float, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, width), nn.Linear(width, 12)
        nn.init.normal_(self.embed.weight, std=words)
        self.places = nn.Parameter(places * torch.randn(10, width))
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.places
        return self.head(h + self.body(h))


@pytest.mark.parametrize("width", [16, 48])
@pytest.mark.parametrize(
    ("places", "words", "drowned"),
    [(20.0, 0.1, True), (50.0, 1.0, True), (1.0, 1.0, False), (0.02, 0.02, False), (0.7, 0.05, False)],
)
def test_words_that_are_drowned_by_their_places(
    places: float, words: float, drowned: bool, width: int
) -> None:
    torch.manual_seed(0)
    model = Words(places, words, width)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randint(12, (32, 10))
        return x, (5 * x + 1) % 12

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    report = gf.diagnose(model, draw, loss, optimizer=torch.optim.Adam(model.parameters(), 1e-3), seed=0)
    serious = [i for i in report.issues if i.severity >= IssueSeverity.MEDIUM]
    found = {i.layer for i in serious if i.issue_type is IssueType.BOTTLENECK}
    assert found == ({"embed"} if drowned else set())
