"""Growth along repeated blocks whose state is made of operations, and parameters that a step throws away."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType

SERIOUS = {"CRITICAL", "HIGH", "MEDIUM"}


def told(model: nn.Module, batches: object, loss: object, optimizer: object = None) -> list[gf.Issue]:
    report = gf.diagnose(model, batches, loss, optimizer=optimizer, seed=0)  # type: ignore[arg-type]
    return [issue for issue in report.issues if issue.severity.value in SERIOUS]


class Pusher(nn.Module):
    """Moves points by forces between them, which grow with their distance unless they are bounded."""

    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self.bounded = bounded
        self.force = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        lines = x[:, :, None] - x[:, None]
        apart = lines.square().sum(-1, keepdim=True)
        push = self.force(apart)
        if self.bounded:
            push, lines = push.tanh() / x.shape[1], lines / (1.0 + (apart + 1e-6).sqrt())
        return x + (push * lines).sum(2)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_points_that_push_one_another_away(bounded: bool, shared: bool) -> None:
    torch.manual_seed(0)
    one = Pusher(bounded)

    class Simulator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            steps = [one] if shared else [Pusher(bounded) for _ in range(5)]
            self.steps = nn.ModuleList(steps)

        def forward(self, x: Tensor) -> Tensor:
            for step in list(self.steps) * (5 if shared else 1):
                x = step(x)
            return x

    def batch() -> tuple[Tensor, Tensor]:
        x = 0.7 * torch.randn(8, 6, 3)
        return x, 0.9 * x

    model = Simulator()
    with torch.no_grad():
        for step in model.steps:
            step.force[2].weight.mul_(0.1)  # type: ignore[union-attr, index, operator]
            step.force[2].bias.fill_(0.1)  # type: ignore[union-attr, index, operator]
    found = {i.issue_type for i in told(model, batch, nn.MSELoss())}
    assert (IssueType.EXPLODING in found) is not bounded
    assert bounded <= (not found)


class Quantised(nn.Module):
    """One learned step size serves all weights, and its gradient sums over them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.head, self.scale = nn.Linear(16, 64), nn.Linear(64, 3), scale
        self.size = nn.Parameter(torch.tensor(0.05))
        self.throw = 0

    def forward(self, x: Tensor) -> Tensor:
        size = self.size * self.scale + (self.size * (1 - self.scale)).detach()
        return self.head(F.relu(self.inner(x)) * size / 0.05)


@pytest.mark.parametrize(("kick", "sick"), [(3e4, True), (0.0, False)])
def test_a_parameter_that_one_step_throws_away(kick: float, sick: bool) -> None:
    """A single step's gradient of the step size is out of all proportion; the model does not come back."""
    torch.manual_seed(1)
    model, centres, count = Quantised(1.0), 3 * torch.randn(3, 16), [0]

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(3, (64,))
        return centres[y] + torch.randn(64, 16), y

    def loss(out: Tensor, y: Tensor) -> Tensor:
        count[0] += 1
        spike = kick * (model.size - model.size.detach()) if count[0] == 6 else 0.0
        return F.cross_entropy(out.clamp(-50.0, 50.0), y) + spike

    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    found = [i for i in told(model, batch, loss, optimizer) if i.issue_type is IssueType.UNSTABLE]
    assert bool(found) is sick


class Matching(nn.Module):
    """Embeddings whose cosines are divided by one learned temperature, or times e to its logarithm."""

    def __init__(self, logarithm: bool) -> None:
        super().__init__()
        self.embed, self.names = nn.Linear(12, 8), nn.Parameter(torch.randn(6, 8))
        self.logarithm = logarithm
        self.heat = nn.Parameter(torch.tensor(2.7 if logarithm else 0.07))

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.normalize(self.embed(x), dim=1) @ F.normalize(self.names, dim=1).T
        return cosines * self.heat.exp() if self.logarithm else cosines / self.heat


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("logarithm", "rate", "sick"), [(False, 0.05, True), (True, 0.05, False)])
def test_one_number_that_its_steps_throw_about(
    logarithm: bool, rate: float, sick: bool, scale: float
) -> None:
    """The gradient of a small temperature has its square below, and steps of one rate throw it past zero."""
    torch.manual_seed(3)
    model, centres = Matching(logarithm), torch.randn(6, 12)

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(6, (64,))
        return centres[y] + 0.5 * torch.randn(64, 12), y

    optimizer = torch.optim.SGD(model.parameters(), rate / scale)
    found = told(model, batch, lambda out, y: scale * F.cross_entropy(out, y), optimizer)
    thrown = [i for i in found if "one number" in i.description]
    assert [i.metrics["parameter"] for i in thrown] == ["heat"] * sick
    assert sick or not found


def test_an_offset_may_move_far_beside_its_own_size() -> None:
    """A bias near zero changes its sign at every step, and the loss hardly knows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 1))
    nn.init.constant_(model[2].bias, 1e-4)  # type: ignore[arg-type]

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 6)
        return x, x[:, :1].sin() + 0.3 * torch.randn(8, 1)

    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    assert not told(model, batch, nn.MSELoss(), optimizer)
