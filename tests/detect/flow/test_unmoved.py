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
    model: nn.Module,
    sample: Callable[[], tuple[Tensor, Tensor]],
    loss: Loss,
    rate: float = 3e-3,
    least: IssueSeverity = MEDIUM,
) -> set[tuple[IssueType, str]]:
    """Return types and layers of what is serious in a run of a model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    report = gf.diagnose(model, sample, loss, steps=20, optimizer=torch.optim.Adam(trained, rate))
    return {(IssueType(i.issue_type), i.layer) for i in report.issues if i.severity >= least}


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


class Gated(nn.Module):
    """A residual stream that blocks add to, each through a gate."""

    def __init__(self, gate: float, *, learned: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)) for _ in range(4)
        )
        self.gates = nn.Parameter(torch.full((4,), gate), requires_grad=learned)
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = 0.1 * self.first(x)
        for gate, block in zip(self.gates, self.blocks, strict=True):
            h = h + gate * block(F.layer_norm(h, (32,)))
        return self.last(h)


@pytest.mark.parametrize(
    ("gate", "learned", "sick"), [(1.0, False, False), (1e-4, True, False), (1e-5, False, True)]
)
def test_blocks_behind_gates_that_are_held_shut(gate: float, learned: bool, sick: bool) -> None:
    found = serious(Gated(gate, learned=learned), classes, F.cross_entropy)
    assert ((FAINT, "blocks.3.2") in found) is sick
    assert all(kind is FAINT and layer.startswith("blocks.") for kind, layer in found)


class Towers(nn.Module):
    """Cosines of what two towers give, over a temperature or times it."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.times = times
        self.one = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
        self.other = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x[:, :8]), self.other(x[:, 8:])
        return self.times * F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T


@pytest.mark.parametrize(("times", "sick"), [(1 / 0.07, False), (0.07, True)])
def test_a_temperature_on_the_wrong_side(times: float, sick: bool) -> None:
    def pairs() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 8)
        return torch.cat([x, x + 0.3 * torch.randn(48, 8)], 1), torch.arange(48)

    found = serious(Towers(times), pairs, F.cross_entropy)
    assert {kind for kind, _ in found} == ({FAINT} if sick else set())
    assert {layer for _, layer in found} <= {"one.2", "other.2"}


@pytest.mark.parametrize(
    ("factor", "least", "sick"),
    [(1.0, IssueSeverity.LOW, False), (100.0, MEDIUM, False), (3e3, MEDIUM, True)],
)
def test_targets_a_thousand_times_as_large_as_outputs(
    factor: float, least: IssueSeverity, sick: bool
) -> None:
    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 8)
        return x, factor * torch.stack([x[:, i] * x[:, i + 1] for i in range(6)], 1)

    found = serious(Scaled(1.0), sample, F.mse_loss, least=least)
    assert ((LARGE, "last") in found) == sick


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


@pytest.mark.parametrize(("size", "sick"), [(1.0, False), (0.03, False), (1e-5, True)])
def test_targets_that_are_next_to_nothing_beside_outputs(size: float, sick: bool) -> None:
    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 8)
        return x, size * torch.stack([x[:, i] * x[:, i + 1] for i in range(6)], 1)

    assert serious(Scaled(1.0), sample, F.mse_loss) == ({(LARGE, "last")} if sick else set())


@pytest.mark.parametrize(("bias", "sick"), [(0.0, False), (50.0, True)])
def test_outputs_of_which_a_bias_is_nearly_all(bias: float, sick: bool) -> None:
    model = Towers(1.0)
    for tower in (model.one, model.other):
        nn.init.constant_(tower.get_parameter("2.bias"), bias)

    def pairs() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 8)
        return torch.cat([x, x + 0.3 * torch.randn(48, 8)], 1), torch.arange(48)

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores / 0.1, target)

    kinds = {kind for kind, _ in serious(model, pairs, loss, least=IssueSeverity.LOW)}
    assert (IssueType.BOTTLENECK in kinds) is sick


class Positive(nn.Module):
    """A network whose outputs go through a softplus."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.last(F.relu(self.first(x))))


@pytest.mark.parametrize(("below", "sick"), [(5.0, True), (-3.0, False)])
def test_targets_below_all_that_a_softplus_gives(below: float, sick: bool) -> None:
    def targets() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 8)
        return x, x[:, :6] - below

    found = serious(Positive(), targets, F.l1_loss, rate=1e-1)
    assert ((IssueType.SATURATION, "last") in found) == sick
    assert sick or not found
