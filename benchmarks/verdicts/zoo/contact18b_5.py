"""Agents, recommenders and equations that look sick and are not, after public questions with that answer."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .claims import Claim, training
from .contact18b_3 import slope
from .data import Sample, choice, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy


def grows(module: str, by: float, *, steps: int = 60) -> Claim:
    """The mean output of a module grows by more than a number within some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        means = [float(step.outputs[module].detach().mean()) for step in training(ready, steps, (module,))]
        return means[-1] - means[0] > by, f"mean of {module} goes from {means[0]:.3g} to {means[-1]:.3g}"

    return claim


def always_zero(module: str, *, steps: int = 10) -> Claim:
    """Every output of a module is exactly zero in every step."""

    def claim(ready: Setup) -> tuple[bool, str]:
        top = max(float(step.outputs[module].abs().max()) for step in training(ready, steps, (module,)))
        return top == 0, f"largest output of {module} = {top:.2g}"

    return claim


# ------------------------------------------------------ reinforcement learning and recommenders


class Offline(nn.Module):
    """A critic of states and actions, and an actor between the data's actions and the critic's wish."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 1))
        self.actor = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2), nn.Tanh())
        self.q_loss = nn.Identity()

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value of the data's action, the actor's own action, and minus the value of that."""
        own = self.actor(state)
        fixed = {name: p.detach() for name, p in self.critic.named_parameters()}
        wish = functional_call(self.critic, fixed, (torch.cat([state, own], -1),))
        return self.critic(torch.cat([state, action], -1))[:, 0], own, self.q_loss(-wish)


def offline(number: int = 64) -> Sample:
    """Return states and actions; the target is the action and its return, where each step costs one."""
    wish = normal(seeded(76), 6, 2) / math.sqrt(6)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        state = normal(g, number, 6)
        action = torch.tanh(state @ wish + 0.5 * normal(g, number, 2))
        steps = 6 + 4 * (action - torch.tanh(state @ wish)).square().sum(-1)
        return (state, action), (action, -steps)

    return sample


def offline_loss(output: tuple[Tensor, Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the critic's error, the actor's distance from the data, and minus its value."""
    (value, own, cost), (action, returns) = output, target
    return F.mse_loss(value, returns) + 3 * F.mse_loss(own, action) + 0.3 * cost.mean()


@healthy(
    "contact18b-healthy-qloss",
    grows("q_loss", 2.0),
    source="https://github.com/seohongpark/fql/issues/10",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_qloss(width: int) -> Setup:
    """The actor's own loss rises all the time: it is minus the critic's value, and the critic learns that
    every step costs something. The critic's error falls, and so does the whole."""
    return setup(Offline(width), offline(), offline_loss, 1e-2)


class Contrasted(nn.Module):
    """Users and items by their vectors, with a contrast of two noisy views of the users."""

    def __init__(self, width: int, users: int = 48, items: int = 48) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        for table in (self.users, self.items):
            nn.init.xavier_normal_(table.weight)
        self.contrast = nn.Identity()

    def forward(self, user: Tensor, liked: Tensor, other: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return by how much the liked item wins, and the contrast of all users."""
        u = self.users(user)
        one = F.normalize(self.users.weight, dim=-1)
        two = F.normalize(one + noise, dim=-1)
        contrast = F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)))
        return (u * (self.items(liked) - self.items(other))).sum(-1), self.contrast(contrast)


def likes(width: int, number: int = 128, users: int = 48, items: int = 48) -> Sample:
    """Return users with an item of their own kind and one of another, and noise for a view."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], None]:
        user, liked = choice(g, users, number), 4 * choice(g, items // 4, number)
        other = 4 * choice(g, items // 4, number) + (user + 1 + choice(g, 3, number)) % 4
        return (user, liked + user % 4, other, 0.08 * normal(g, users, width)), None

    return sample


def likes_loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
    """Return the ranking loss and a small part of the contrast."""
    margin, contrast = output
    return -F.logsigmoid(margin).mean() + 0.05 * contrast


@healthy(
    "contact18b-healthy-contrast",
    grows("contrast", 0.3),
    source="https://github.com/RUCAIBox/NCL/issues/29",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_contrast(width: int) -> Setup:
    """The contrastive term is small for vectors drawn at random, which lie far apart, and jumps once the
    ranking draws users of one taste together; the ranking loss falls, and with it the whole."""
    return setup(Contrasted(width), likes(width), likes_loss, 1e-2)


# --------------------------------------------------------------------- physics-informed networks


class Plate(nn.Module):
    """A network for a field on a square that is zero on the edge by its form."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )
        self.edge = nn.Identity()

    def field(self, x: Tensor) -> Tensor:
        """Return the field."""
        return (x * (1 - x)).prod(-1, keepdim=True) * self.net(x)

    def forward(self, inside: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        """Return the equation's residual inside, and the field on the edge."""
        with torch.enable_grad():
            x = inside.detach().requires_grad_()
            first = slope(self.field(x), x)
            laplacian = slope(first[:, :1], x)[:, :1] + slope(first[:, 1:], x)[:, 1:]
        force = torch.sin(math.pi * inside).prod(-1, keepdim=True)
        return laplacian - 10 * force, self.edge(self.field(edge))


def square(number: int = 48) -> Sample:
    """Return places inside the square and on its edge."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
        edge = uniform(g, 16, 2)
        edge[:8, 0] = (edge[:8, 0] > 0.5).float()
        edge[8:, 1] = (edge[8:, 1] > 0.5).float()
        return (uniform(g, number, 2), edge), None

    return sample


@healthy(
    "contact18b-healthy-edge",
    always_zero("edge"),
    source="https://github.com/PINA-org/PINA/issues/100",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_edge(width: int) -> Setup:
    """The boundary's loss is exactly zero from the first step on and gives no gradient: the field is the
    network times a factor that is zero on the edge, so there is nothing left to learn there."""
    return setup(Plate(width), square(), lambda o, _: o[0].square().mean() + o[1].square().mean(), 5e-3)
