"""Parameters along which the loss is a cliff, since what is behind divides by next to nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import Issue, IssueSeverity, IssueType

Norm = Callable[[Tensor], Tensor]


def told(report: gf.Report) -> list[Issue]:
    return [i for i in report.issues if i.severity > IssueSeverity.LOW]


class Towers(nn.Module):
    """Users and items as directions."""

    def __init__(self, norm: Norm, zero: int) -> None:
        super().__init__()
        self.users = nn.Embedding(48, 32)
        self.items = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32))
        nn.init.normal_(self.users.weight, std=0.1)
        self.users.weight.data[:zero] = 0
        self.norm = norm

    def forward(self, who: Tensor, what: Tensor) -> Tensor:
        return self.norm(self.users(who)) @ F.normalize(self.items(what), dim=-1).T / 0.1


def towers(norm: Norm, zero: int, optimizer: str, scale: float = 1.0) -> list[Issue]:
    torch.manual_seed(0)
    model, taste = Towers(norm, zero), 2 * torch.randn(48, 8)

    def batch() -> tuple[Tensor, Tensor]:
        who = torch.randperm(48)[:24]
        return who, taste[who] + 0.5 * torch.randn(24, 8)

    made: dict[str, Callable[[], torch.optim.Optimizer | None]] = {
        "adam": lambda: torch.optim.Adam(model.parameters(), 1e-2),
        "sgd": lambda: torch.optim.SGD(model.parameters(), 0.1 / scale),
        "none": lambda: None,
    }
    loss = lambda scores: scale * F.cross_entropy(scores, torch.arange(24))  # noqa: E731
    return told(gf.diagnose(model, batch, loss, steps=20, optimizer=made[optimizer]()))


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def by_norm(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + 1e-9)


def by_root(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-18)


def by_root_and_epsilon(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("norm", [unit, by_norm, by_root])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "none"])
def test_rows_of_zeros_that_are_normalised(norm: Norm, optimizer: str) -> None:
    (issue,) = towers(norm, 48, optimizer)
    assert (issue.layer, issue.issue_type) == ("users", IssueType.EXPLODING)
    assert "divides by next to nothing" in issue.description
    assert issue.recommended_actions[0].startswith("Start users.weight at random")


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_few_rows_at_any_scale_of_the_loss(scale: float) -> None:
    (issue,) = towers(unit, 5, "adam", scale)
    assert (issue.layer, issue.issue_type) == ("users", IssueType.EXPLODING)


def as_it_is(x: Tensor) -> Tensor:
    return x


def by_layer(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize(
    ("norm", "zero"), [(unit, 0), (by_root_and_epsilon, 48), (by_layer, 48), (as_it_is, 48)]
)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_rows_with_a_length_or_an_epsilon(norm: Norm, zero: int, optimizer: str) -> None:
    assert not towers(norm, zero, optimizer)


class Standardised(nn.Module):
    """A hidden layer whose units are divided by their deviation over the batch."""

    def __init__(self, still: bool) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 32), nn.Linear(32, 1)
        if still:
            nn.init.zeros_(self.inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.out(torch.tanh((h - h.mean(0)) / (h.std(0) + 1e-9)))


@pytest.mark.parametrize("still", [True, False])
def test_units_that_are_constant_and_divided_by_their_deviation(still: bool) -> None:
    torch.manual_seed(0)
    model = Standardised(still)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 8)
        return x, torch.sin(x[:, :1])

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    found = told(gf.diagnose(model, batch, F.mse_loss, steps=20, optimizer=optimizer))
    assert [i.layer for i in found if i.issue_type is IssueType.EXPLODING] == ["inner"] * still


@pytest.mark.parametrize("shift", [0.0, 1e-7])
def test_the_loss_of_a_policy_is_next_to_zero_by_itself(shift: float) -> None:
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 4))

    def batch() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        gain = torch.randn(64)
        return torch.randn(64, 6), (torch.randint(4, (64, 1)), (gain - gain.mean()) / gain.std())

    def loss(scores: Tensor, taken: tuple[Tensor, Tensor]) -> Tensor:
        log = scores.log_softmax(-1).gather(1, taken[0])[:, 0]
        return shift - ((log - log.detach()).exp() * taken[1]).mean()

    optimizer = torch.optim.Adam(policy.parameters(), 3e-4)
    report = gf.diagnose(policy, batch, loss, steps=2, optimizer=optimizer)
    assert not [i for i in told(report) if i.issue_type is IssueType.EXPLODING]
