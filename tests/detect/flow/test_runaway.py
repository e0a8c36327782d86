"""Losses that leave where they began, numbers thrown by one step; and healthy runs that look alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import gradflow as gf
from gradflow.records import Issue, IssueType


def unstable(
    model: nn.Module, batches: Any, loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer
) -> list[Issue]:
    report = gf.diagnose(model, batches, loss, optimizer=optimizer, steps=20, seed=0)
    return [i for i in report.issues if i.issue_type is IssueType.UNSTABLE and i.severity.is_serious]


# ----------------------------------------------------------------------------- below zero, without end


class Judge(nn.Module):
    """A critic of real and of made numbers, which something may hold to a slope."""

    def __init__(self, hold: str, width: int) -> None:
        super().__init__()
        self.hold = hold
        self.net = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )
        if hold == "norm":
            for layer in (self.net[0], self.net[2], self.net[4]):
                spectral_norm(layer)

    def forward(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.hold == "clip":
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.clamp_(-0.05, 0.05)
        slope = torch.ones(())
        if self.hold == "penalty":
            between = (0.5 * real + 0.5 * made).requires_grad_()
            (slope,) = torch.autograd.grad(self.net(between).sum(), between, create_graph=True)
            slope = slope.norm(dim=1)
        return self.net(real), self.net(made), slope


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("hold", ["", "clip", "norm", "penalty", "hinge"])
def test_a_critic_that_nothing_holds_to_a_slope(hold: str, width: int) -> None:
    torch.manual_seed(0)
    model = Judge(hold, width)

    def loss(out: tuple[Tensor, Tensor, Tensor], _: Tensor) -> Tensor:
        if hold == "hinge":
            return F.relu(1 - out[0]).mean() + F.relu(1 + out[1]).mean()
        return out[1].mean() - out[0].mean() + 10 * (out[2] - 1).square().mean()

    def draw() -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (torch.randn(64, 16) + torch.tensor([1.0, -1.0] * 8), torch.randn(64, 16).tanh()), torch.ones(
            ()
        )

    found = unstable(model, draw, loss, torch.optim.Adam(model.parameters(), 5e-3))
    assert bool(found) == (not hold)


class Agent(nn.Module):
    """An actor, and a critic of its actions, which may learn from the actor's loss too."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
        self.leaks = leaks

    def forward(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.cat([s, self.actor(s)], 1)
        fixed = {n: p if self.leaks else p.detach() for n, p in self.critic.named_parameters()}
        return self.critic(torch.cat([s, a], 1)), torch.func.functional_call(self.critic, fixed, own)


def moves() -> tuple[tuple[Tensor, Tensor], Tensor]:
    s, a = torch.randn(64, 4), 2 * torch.rand(64, 2) - 1
    return (s, a), torch.exp(-(a - s[:, :2].tanh()).square().sum(1, keepdim=True))


def agent_loss(out: tuple[Tensor, Tensor], reward: Tensor) -> Tensor:
    return F.smooth_l1_loss(out[0], reward) - out[1].mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("leaks", [True, False])
def test_a_critic_that_may_raise_its_own_value(leaks: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Agent(leaks)
    found = unstable(model, moves, agent_loss, torch.optim.Adam(model.parameters(), 1e-2))
    assert bool(found) == leaks


class Told(nn.Module):
    """A critic of what is real and what is made: its loss falls below zero, and may."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        return self.critic(real), self.critic(made)


def test_a_critic_that_tells_real_from_made_may_fall_below_zero() -> None:
    torch.manual_seed(0)
    model = Told()
    batches = lambda: (1 + torch.randn(64, 4), torch.randn(64, 4) - 1)  # noqa: E731
    loss = lambda out: out[1].mean() - out[0].mean()  # noqa: E731
    assert unstable(model, batches, loss, torch.optim.Adam(model.parameters(), 1e-2)) == []


# ------------------------------------------------------------------------------ upwards, step by step


class Chasing(nn.Module):
    """Values whose targets are its own at the next state, or those of a copy that stays behind."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 1))
        self.behind = None if own else copy.deepcopy(self.value).requires_grad_(False)

    def forward(self, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ahead = (self.behind or self.value)(then)
        return self.value(now), ahead


def chase() -> tuple[tuple[Tensor, Tensor], Tensor]:
    x, at = torch.randn(128, 4), 1 + 3 * torch.rand(128, 1)
    return (torch.cat([x, at], 1), torch.cat([x, 2 * at], 1)), torch.ones(128, 1)


@pytest.mark.parametrize("own", [True, False])
def test_targets_that_run_away_from_the_values_that_make_them(own: bool) -> None:
    torch.manual_seed(0)
    model = Chasing(own)
    loss = lambda out, gain: F.mse_loss(out[0], gain + out[1])  # noqa: E731
    found = unstable(model, chase, loss, torch.optim.SGD(model.parameters(), 3e-3))
    assert bool(found) == own


class Critic(nn.Module):
    """Values of four actions, and those at the next state: by the same net, or by a copy that follows."""

    def __init__(self, follows: float | None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        self.copy = None if follows is None else copy.deepcopy(self.net).requires_grad_(False)
        self.follows = follows

    def forward(self, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        if self.copy is None or self.follows is None:
            return self.net(now), self.net(then).detach()
        for old, new in zip(self.copy.parameters(), self.net.parameters(), strict=True):
            old.data.lerp_(new.data, self.follows)
        return self.net(now), self.copy(then)


def the_best(ahead: Tensor, _: Tensor) -> Tensor:
    return ahead.max(-1).values


def soft(ahead: Tensor, _: Tensor) -> Tensor:
    return 0.1 * (ahead / 0.1).logsumexp(-1)


def of_the_next(ahead: Tensor, action: Tensor) -> Tensor:
    return ahead.gather(1, action.flip(0)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("ahead", "follows", "rate", "steps", "sick"),
    [(the_best, None, 1e-2, 1, True), (soft, None, 1e-2, 1, True), (of_the_next, None, 4e-2, 1, True),
     (the_best, 0.5, 0.1, 3, True), (the_best, None, 1e-3, 1, False), (soft, 0.005, 5e-3, 1, False),
     (of_the_next, None, 1e-3, 1, False), (the_best, 0.05, 3e-3, 3, False)],
)  # fmt: skip
def test_a_critic_that_runs_after_its_own_values(
    ahead: Callable[[Tensor, Tensor], Tensor], follows: float | None, rate: float, steps: int, sick: bool
) -> None:
    torch.manual_seed(0)
    model, gains = Critic(follows), torch.randn(6, 4) / 6**0.5

    def batch() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        now, action = torch.randn(128, 6), torch.randint(4, (128,))
        gain = steps * torch.tanh(2 * now @ gains).gather(1, action[:, None])[:, 0]
        return (now, 0.95 * now + 0.3 * torch.randn(128, 6)), (action, gain, torch.rand(128) < 0.05)

    def loss(values: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        action, gain, over = seen
        goal = gain + 0.99**steps * ahead(values[1], action) * ~over
        return F.mse_loss(values[0].gather(1, action[:, None])[:, 0], goal)

    found = unstable(model, batch, loss, torch.optim.Adam(model.parameters(), rate))
    assert bool(found) is sick


class Ahead(nn.Module):
    """Values, and those at the next state by the same net or by a copy that was noted before."""

    def __init__(self, own: bool, squash: type[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 32), squash(), nn.Linear(32, 32), squash(), nn.Linear(32, 1)
        )  # fmt: skip
        self.noted = None if own else copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(now), (self.noted or self.net)(then).detach()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("squash", "rate"), [(nn.GELU, 0.02), (nn.ReLU, 0.01)])
def test_a_jump_at_the_end_of_values_that_run_away(own: bool, squash: type[nn.Module], rate: float) -> None:
    """What its targets cost others by then has run away too, and tells of no model that came knowing."""
    torch.manual_seed(0)
    model, turn = Ahead(own, squash), torch.linalg.qr(torch.randn(6, 6))[0]

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = torch.randn(64, 6)
        return (x, 2 * x @ (0.9 * torch.eye(6) + 0.1 * turn)), 1 + x[:, :1].abs()

    loss = lambda out, gain: F.mse_loss(out[0], gain + 0.99 * out[1])  # noqa: E731
    assert bool(unstable(model, batch, loss, torch.optim.SGD(model.net.parameters(), rate))) is own


# ------------------------------------------------------------------------- what comes with it


@pytest.mark.parametrize(("rate", "told"), [(3.0, True), (0.05, False)])
def test_a_head_whose_gradient_grows_while_its_loss_runs_away_explodes_too(rate: float, told: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    batches = lambda: (torch.randn(32, 8), torch.randn(32, 1))  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), rate)
    report = gf.diagnose(model, batches, F.mse_loss, optimizer=optimizer, steps=12, seed=0)
    kinds = {(i.issue_type, i.layer) for i in report.issues if i.severity.is_serious}
    assert ((IssueType.EXPLODING, "2") in kinds) == told
    assert any(kind is IssueType.UNSTABLE for kind, _ in kinds) == told
    if told:
        assert report.causes[0].issue_type is IssueType.UNSTABLE
        assert IssueType.EXPLODING in {i.issue_type for i in report.causes[0].issues}


# ----------------------------------------------------------------------------------- a number thrown


class Scaled(nn.Module):
    """Raw inputs times a number that makes them small."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1e-3))
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.scale * x)


def raw() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 8)
    return 1000 * x, (x[:, :3] * x[:, 3:6]).argmax(1)


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("rate", [0.1, 1e-4])
def test_a_scale_that_the_first_step_throws(rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = Scaled()
    found = unstable(model, raw, F.cross_entropy, torch.optim.Adam(model.parameters(), rate))
    assert [(i.layer, i.metrics.get("parameter")) for i in found] == ([("", "scale")] if rate == 0.1 else [])


# ------------------------------------------------------------------------------- in a straight line


class Centre(nn.Module):
    """One-class scores of features; with a bias behind them, all scores can be raised at no cost."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.hidden, self.score = nn.Linear(4, 16), nn.Linear(16, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(torch.sigmoid(self.hidden(x)))[:, 0]


@pytest.mark.parametrize("bounded", [True, False])
def test_a_loss_that_is_a_straight_line_in_a_parameter(bounded: bool) -> None:
    torch.manual_seed(0)
    model = Centre(bias=True)

    def loss(scores: Tensor) -> Tensor:
        weights = model.hidden.weight.square().sum() + model.score.weight.square().sum()
        reward = -(scores - 2).square().mean() if bounded else scores.mean()
        return 0.01 * weights - reward - (4.0 if bounded else 0.1)

    optimizer = torch.optim.Adam(model.parameters(), 5e-2)
    found = unstable(model, lambda: torch.randn(32, 4), loss, optimizer)
    assert bool(found) is not bounded
