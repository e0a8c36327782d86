"""Reinforcement learning and physics-informed networks after public reports."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import every, flat, no_gradient, strong, weak
from .data import Sample, choice, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, sick

# -------------------------------------------------------------------------- reinforcement learning

SCALE = torch.tensor([200.0, 200.0, 100.0, 3.0, 50.0, 9000.0])


def driving(scaled: bool, number: int = 64) -> Sample:
    """Return states of a car (distances, speed, angle, height, engine), and the steering and braking that
    earns the most there."""
    wish = 1.2 * normal(seeded(61), 6, 2)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        unit = 2 * uniform(g, number, 6) - 1
        return unit if scaled else unit * SCALE, torch.tanh(unit @ wish)

    return sample


def lost_reward(action: Tensor, best: Tensor) -> Tensor:
    """Return minus the reward: how far the action is from the best one."""
    return (action - best).square().sum(-1).mean()


@sick(
    "contact18b-rl-bounds",
    [("SATURATION", "squash")],
    flat("squash", "tanh", 0.8),
    allow=("EXPLODING",),
    source="https://github.com/ZhengXinyue/Deep-rl-mxnet/issues/12",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rl_bounds(sick: bool, width: int) -> Setup:
    """The actor's states are in metres, degrees and turns a minute: what reaches the tanh is huge, and both
    actions stick at their bounds, where no gradient passes. States of unit size repair it."""
    actor = stack(
        fc1=nn.Linear(6, width),
        act1=nn.ReLU(),
        fc2=nn.Linear(width, width),
        act2=nn.ReLU(),
        mu=nn.Linear(width, 2),
        squash=nn.Tanh(),
    )
    return setup(actor, driving(not sick), lost_reward, 3e-3)


class ActorCritic(nn.Module):
    """A policy and a value on one trunk."""

    def __init__(self, width: int, actions: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.actor = nn.Linear(width, actions)
        self.critic = nn.Linear(width, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actions' scores and the value."""
        hidden = self.trunk(state)
        return self.actor(hidden), self.critic(hidden)[:, 0]


def rollouts(size: float, number: int = 64) -> Sample:
    """Return states, with the action taken at random, its advantage, and the return in units of `size`."""
    g0 = seeded(62)
    worth, better = normal(g0, 8) / math.sqrt(8), normal(g0, 8, 4)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        state, action = normal(g, number, 8), choice(g, 4, number)
        gain = (state @ better).gather(1, action[:, None])[:, 0]
        gain = (gain - gain.mean()) / gain.std()
        return state, (action, gain, size * (1 + 0.5 * torch.sin(2 * state @ worth)))

    return sample


def joint_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the clipped policy loss against the uniform policy of the rollout, and the value loss."""
    (scores, value), (action, gain, returns) = output, target
    ratio = 4 * scores.softmax(-1).gather(1, action[:, None])[:, 0]
    policy = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
    return 0.5 * F.mse_loss(value, returns) - policy.mean()


@sick(
    "contact18b-rl-returns",
    [("EXPLODING", "critic")],
    every(weak("actor", "critic", 1e-3), strong("critic", 100.0)),
    allow=("UNSTABLE", "BOTTLENECK"),
    source="https://github.com/nikhilbarhate99/PPO-PyTorch/issues/19",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rl_returns(sick: bool, width: int) -> Setup:
    """Policy and value share a trunk and one loss, and the returns are in the hundreds: the value's gradient
    is a thousand times the policy's, and the trunk learns for it alone. Returns of unit size repair it."""
    return setup(ActorCritic(width), rollouts(500.0 if sick else 1.0), joint_loss, 3e-3)


# --------------------------------------------------------------------- physics-informed networks


def slope(y: Tensor, x: Tensor) -> Tensor:
    """Return the derivative of each output with respect to its own input."""
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


class Conduction(nn.Module):
    """The equation of a rod with an unknown conductivity."""

    def __init__(self) -> None:
        super().__init__()
        self.conductivity = nn.Parameter(torch.tensor(0.2))

    def forward(self, curvature: Tensor, source: Tensor) -> Tensor:
        """Return the residual."""
        return self.conductivity * curvature + source


class Inverse(nn.Module):
    """A network for the temperature, and the equation whose coefficient is sought."""

    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, width), act(), nn.Linear(width, width), act(), nn.Linear(width, 1)
        )
        self.physics = Conduction()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the temperature and the equation's residual."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.net(x)
            curvature = slope(slope(u, x), x)
        return u, self.physics(curvature, torch.sin(math.pi * x))


def rod(number: int = 48) -> Sample:
    """Return places on a rod, with the temperature measured there."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 2 * uniform(g, number, 1) - 1
        return x, torch.sin(math.pi * x) + 0.01 * normal(g, number, 1)

    return sample


def physics_loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Return the error of the data and that of the equation."""
    u, residual = output
    return F.mse_loss(u, target) + residual.square().mean()


@sick(
    "contact18b-pinn-relu",
    [("DEAD", "*")],
    no_gradient("physics"),
    source="https://arxiv.org/abs/2512.11184",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def pinn_relu(sick: bool, width: int) -> Setup:
    """The second derivative of a network of ReLUs is zero everywhere, so the residual is the bare source: the
    conductivity never gets a gradient, and the equation teaches nothing. Tanh in place of ReLU repairs it."""
    return setup(Inverse(width, nn.ReLU if sick else nn.Tanh), rod(), physics_loss, 1e-2)


class Decay(nn.Module):
    """A network for a concentration that decays along a pipe, by its equation and its value at the inlet."""

    def __init__(self, width: int, length: float, *, scaled: bool) -> None:
        super().__init__()
        self.length, self.scaled = length, scaled
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the equation's residual, and the value at the inlet."""
        with torch.enable_grad():
            x = torch.cat([torch.zeros_like(x[:1]), x]).detach().requires_grad_()
            u = self.net(x / self.length if self.scaled else x)
            residual = self.length * slope(u, x) + 2 * u
        return residual, u[0]


def pipe(length: float, number: int = 48) -> Sample:
    """Return places along the pipe, without a target."""
    return lambda g: (length * uniform(g, number, 1), None)


def inlet_loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
    """Return the error of the equation and that of the value at the inlet, which is one."""
    residual, inlet = output
    return residual.square().mean() + 5 * (inlet - 1).square().mean()


@sick(
    "contact18b-pinn-metres",
    [("SATURATION", "net")],
    flat("net.1", "tanh", 0.9),
    allow=("EXPLODING", "VANISHING"),
    source="https://github.com/lululxvi/deepxde/issues/257",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def pinn_metres(sick: bool, width: int) -> Setup:
    """The network is fed the place in metres, up to five hundred: all tanh of the first layer are at their
    flat ends nearly everywhere, and so are the slopes zero. Rescaling the place to one repairs it."""
    return setup(Decay(width, 500.0, scaled=not sick), pipe(500.0), inlet_loss, 3e-3)
