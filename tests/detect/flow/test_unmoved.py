"""Losses that stand still under steps of a usual size, and those that inputs or outputs off scale make."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

Loss = Callable[..., Tensor]
MEDIUM = IssueSeverity.MEDIUM
FAINT, LARGE = IssueType.VANISHING, IssueType.EXPLODING


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def serious(
    model: nn.Module, sample: Callable[[], tuple[Tensor, Tensor]], loss: Loss, rate: float = 3e-3
) -> set[tuple[IssueType, str]]:
    """Return types and layers of what is serious in a run of a model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    report = gf.diagnose(model, sample, loss, steps=20, optimizer=torch.optim.Adam(trained, rate))
    return {(IssueType(i.issue_type), i.layer) for i in report.issues if i.severity >= MEDIUM}


class Scaled(nn.Module):
    """A network whose outputs are multiplied by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.last(F.relu(self.first(x)))


def classes() -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 8)
    return x, x[:, :6].argmax(1)


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize(("factor", "sick"), [(1.0, False), (0.3, False), (1e-3, True)])
def test_outputs_that_a_constant_makes_next_to_nothing(factor: float, sick: bool, scale: float) -> None:
    found = serious(Scaled(factor), classes, lambda y, t: scale * F.cross_entropy(y, t))
    assert found == ({(FAINT, "last")} if sick else set())


class Adapted(nn.Module):
    """A frozen layer, and a product of two small matrices beside it, times a constant."""

    def __init__(self, taken: int, given: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.frozen = nn.Linear(taken, given).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, taken) / taken**0.5)
        self.up = nn.Parameter(torch.zeros(given, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.factor * (x @ self.down.T) @ self.up.T


@pytest.mark.parametrize(("factor", "sick"), [(2.0, False), (1e-3, True)])
def test_adapters_of_next_to_no_weight(factor: float, sick: bool) -> None:
    model = nn.Sequential(Adapted(8, 64, factor), nn.ReLU(), Adapted(64, 6, factor))
    assert serious(model, classes, F.cross_entropy) == ({(FAINT, "2")} if sick else set())


@pytest.mark.parametrize(("factor", "sick"), [(1.0, False), (3e3, True)])
def test_targets_a_thousand_times_as_large_as_outputs(factor: float, sick: bool) -> None:
    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 8)
        return x, factor * torch.stack([x[:, i] * x[:, i + 1] for i in range(6)], 1)

    found = serious(Scaled(1.0), sample, F.mse_loss)
    assert found == ({(LARGE, "last")} if sick else set())


@pytest.mark.parametrize(("size", "answer", "sick"), [(1.0, 1.0, False), (1e4, 1.0, True), (1e4, 1e4, False)])
def test_inputs_that_make_the_loss_as_large_as_they_are(size: float, answer: float, sick: bool) -> None:
    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 8)
        return size * x, answer * x[:, :6]

    found = {(kind, layer) for kind, layer in serious(Scaled(1.0), sample, F.mse_loss) if kind is LARGE}
    assert found == ({(LARGE, "first")} if sick else set())


class Density(nn.Module):
    """A mean and the logarithm of a deviation for every sample."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh())
        self.mean, self.log_deviation = nn.Linear(32, 1), nn.Linear(32, 1)
        nn.init.constant_(self.log_deviation.bias, start)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net(x)
        return self.mean(h), self.log_deviation(h)


@pytest.mark.parametrize(("start", "sick"), [(0.0, False), (-2.0, False), (-9.0, True)])
def test_a_density_that_starts_far_too_narrow(start: float, sick: bool) -> None:
    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 4)
        return x, 0.5 * x[:, :1].tanh()

    def loss(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        mean, log_deviation = outputs
        z = (target - mean) / log_deviation.exp()
        return (0.5 * z.square() + log_deviation).mean() - 0.5

    found = {x for x in serious(Density(start), sample, loss) if x == (LARGE, "log_deviation")}
    assert found == ({(LARGE, "log_deviation")} if sick else set())


def test_a_small_last_layer_is_heard() -> None:
    model = Scaled(1.0)
    with torch.no_grad():
        model.last.weight.mul_(0.01)
        model.last.bias.zero_()
    assert serious(model, classes, F.cross_entropy) == set()
