"""Outputs that no weight changes, or changes the loss by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType


class Curved(nn.Module):
    """A network of one variable, and its second derivative."""

    def __init__(self, activation: type[nn.Module], *, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        self.net = nn.Sequential(
            nn.Linear(1, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_(True)
        y = self.net(x)
        slope = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        bend = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
        return y, bend.detach() if self.cut else bend


def serious(
    model: nn.Module, sample: Callable[[], tuple[Tensor, Tensor]], loss: Callable[..., Tensor]
) -> set[tuple[IssueType, str]]:
    torch.manual_seed(0)
    report = gf.diagnose(model, sample, loss, steps=8, optimizer=torch.optim.Adam(model.parameters(), 1e-3))
    return {(IssueType(i.issue_type), i.layer) for i in report.issues if i.severity >= IssueSeverity.MEDIUM}


def line() -> tuple[Tensor, Tensor]:
    x = torch.rand(48, 1)
    return x, 4 * torch.sin(6.28 * x)


def residual(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return (outputs[1] + target).square().mean() + outputs[0][:2].square().sum()


@pytest.mark.parametrize(
    ("activation", "cut", "sick"), [(nn.Tanh, False, False), (nn.Tanh, True, True), (nn.ReLU, False, True)]
)
def test_a_second_derivative(activation: type[nn.Module], cut: bool, sick: bool) -> None:
    torch.manual_seed(0)
    found = serious(Curved(activation, cut=cut), line, residual)
    assert found == ({(IssueType.DEAD, "net.4")} if sick else set())


class Twin(nn.Module):
    """Two views of a sample, one of them held as a target."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.guess = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = self.net(x + 0.1 * torch.randn_like(x)), self.net(x + 0.1 * torch.randn_like(x))
        return self.guess(one), other.detach()


def test_an_output_that_others_are_held_against_is_a_target() -> None:
    torch.manual_seed(0)

    def loss(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return -F.cosine_similarity(*outputs).mean() + 1

    found = serious(Twin(), lambda: (torch.randn(32, 8), torch.zeros(32)), loss)
    assert not any(kind is IssueType.DEAD for kind, _ in found)


class Penalised(nn.Module):
    """Scores, and a penalty that is switched off, or that was computed without its graph."""

    def __init__(self, *, off: bool) -> None:
        super().__init__()
        self.net, self.off = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), off

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_(True)
        y = self.net(x)
        slope = torch.autograd.grad(y.sum(), x, create_graph=True)[0].detach()
        return y, torch.zeros_like(slope) if self.off else slope


@pytest.mark.parametrize("off", [True, False])
def test_a_term_that_is_switched_off(off: bool) -> None:
    """Zeros that hold a place add nothing to any loss."""
    torch.manual_seed(0)

    def loss(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(outputs[0], target) + (outputs[1] - 1).square().mean()

    found = serious(Penalised(off=off), line, loss)
    assert found == (set() if off else {(IssueType.DEAD, "net.2")})


class Ratio(nn.Module):
    """The probability of an action that is drawn, over itself, which does not move."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, log: Tensor) -> Tensor:
        if self.how == "rounded":  # the same number, of a sign that lets the gradient pass
            return (log[:, :1] > -9).float() + log[:, :1] - log[:, :1].detach()
        chosen = log.gather(1, torch.multinomial(log.detach().exp(), 1))
        if self.how == "exponential":
            return (chosen - chosen.detach()).exp()
        return chosen.exp() / chosen.exp().detach()


class Player(nn.Module):
    """A policy that gives its ratio to itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 4))
        self.ratio = Ratio(how)

    def forward(self, x: Tensor) -> Tensor:
        return self.ratio(self.net(x).log_softmax(-1))


def states() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 6)
    return x, torch.relu(x[:, :1])


@pytest.mark.parametrize("how", ["exponential", "quotient", "rounded"])
def test_a_ratio_to_itself_is_one_for_every_sample_by_its_make(how: str) -> None:
    found = serious(Player(how), states, lambda ratio, reward: -(ratio * reward).mean())
    assert found == ({(IssueType.BOTTLENECK, "ratio")} if how == "rounded" else set())


class Game(nn.Module):
    """A maker and a judge; what comes out is what was made, and the real samples beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        self.judge = nn.Sequential(nn.Linear(3, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, z: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        return self.maker(z), real


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("held", [False, True])
def test_real_samples_that_the_loss_shows_to_a_judge(width: int, held: bool) -> None:
    """Its part of the loss is no constant to the judge; nor is it one that an optimizer could do without."""
    torch.manual_seed(0)
    model = Game(width)
    odds = F.binary_cross_entropy_with_logits

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        made, real = output
        yes, no = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        judged = odds(model.judge(real), yes) + odds(model.judge(made.detach()), no)
        return judged if held else judged + 0.1 * odds(model.judge(made), yes)

    def sample() -> tuple[Tensor, Tensor]:
        return torch.randn(32, 4), 2 + torch.randn(32, 3)

    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, sample, loss, steps=8, optimizer=optimizer)
    assert not [i for i in report.issues if "has no graph" in i.description]


class Plate(nn.Module):
    """A field on a line with the residual of its equation, and the field on the edge, zero there by a factor
    or as the loss asks."""

    def __init__(self, activation: type[nn.Module], *, hard: bool) -> None:
        super().__init__()
        self.hard = hard
        self.net = nn.Sequential(
            nn.Linear(1, 24), activation(), nn.Linear(24, 24), activation(), nn.Linear(24, 1)
        )

    def field(self, x: Tensor) -> Tensor:
        return x * (1 - x) * self.net(x) if self.hard else self.net(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_(True)
        slope = torch.autograd.grad(self.field(x).sum(), x, create_graph=True)[0]
        bend = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
        return bend - 3.0 if self.hard else bend, self.field(torch.tensor([[0.0], [1.0]]))


@pytest.mark.parametrize(
    ("activation", "hard", "sick"),
    [
        (nn.Tanh, True, False),
        (nn.Softplus, True, False),
        (nn.SiLU, False, False),
        (nn.ReLU, False, True),
        (nn.LeakyReLU, False, True),
    ],
)
def test_a_condition_that_is_met_by_its_form(activation: type[nn.Module], hard: bool, sick: bool) -> None:
    """A field that is zero on the edge has nothing to learn there; a Laplacian of rectifiers is zero too, and
    teaches nothing."""
    torch.manual_seed(0)
    edge = torch.tensor([[0.0], [0.0 if hard else 1.0]])

    def loss(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return outputs[0].square().mean() + (outputs[1] - edge).square().mean()

    found = serious(Plate(activation, hard=hard), lambda: (torch.rand(32, 1), torch.zeros(1)), loss)
    assert {kind for kind, _ in found} == ({IssueType.DEAD} if sick else set())
