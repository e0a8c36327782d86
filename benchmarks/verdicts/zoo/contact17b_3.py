"""Cases after reports on agents and physics-informed networks that do not train."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from .claims import Claim, every, flat, no_gradient, training
from .data import adam, choice, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, call, sick

functional = nn.functional


# ----------------------------------------------------------------------------------------- agents


class DDPG(nn.Module):
    """An actor with tanh at its end and a critic that judges its actions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.actor = stack(
            layer1=nn.Linear(12, width),
            act1=nn.ReLU(),
            layer2=nn.Linear(width, width),
            act2=nn.ReLU(),
            layer3=nn.Linear(width, 2),
            squash=nn.Tanh(),
        )
        self.critic = nn.Sequential(nn.Linear(14, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, raw: Tensor, state: Tensor, tried: Tensor) -> tuple[Tensor, Tensor]:
        value = self.critic(torch.cat([state, tried], 1))
        fixed = {name: p.detach() for name, p in self.critic.named_parameters()}
        judged = torch.cat([state, self.actor(raw)], 1)
        return value, torch.func.functional_call(self.critic, fixed, (judged,))


@sick(
    "contact17b-agent-saturated",
    [("SATURATION", "actor")],
    flat("actor.squash", "tanh", 0.8, steps=5),
    allow=("VANISHING",),
    source="https://github.com/m5823779/motion-planner-reinforcement-learning/issues/1",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def agent_saturated(sick: bool, width: int) -> Setup:
    """A robot's actor is given raw laser ranges and headings in degrees: its tanh output sits at the ends of
    the action range, whatever the state. Repair: the same state in units of one."""
    w = normal(seeded(34), 12, 2) / math.sqrt(12)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        state, tried = normal(g, 64, 12), 2 * uniform(g, 64, 2) - 1
        reward = -(tried - torch.tanh(state @ w)).square().sum(1, keepdim=True)
        return (180 * state if sick else state, state, tried), reward

    def loss(output: tuple[Tensor, Tensor], reward: Tensor) -> Tensor:
        value, judged = output
        return functional.mse_loss(value, reward) - 0.1 * judged.mean()

    return setup(DDPG(width), sample, loss, 3e-3)


class Imagination(nn.Module):
    """An actor of discrete actions that is to climb a learned model of the reward, through its samples."""

    def __init__(self, width: int, *, through: bool) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(6, width), nn.ELU(), nn.Linear(width, 5))
        self.reward = nn.Sequential(nn.Linear(11, width), nn.ELU(), nn.Linear(width, 1))
        self.through = through

    def forward(self, state: Tensor, tried: Tensor) -> tuple[Tensor, Tensor]:
        guess = self.reward(torch.cat([state, tried], 1))
        chances = self.actor(state).softmax(-1)
        action = torch.distributions.OneHotCategorical(probs=chances).sample()
        if self.through:
            action = action + chances - chances.detach()
        fixed = {name: p.detach() for name, p in self.reward.named_parameters()}
        imagined = torch.cat([state, action], 1)
        return guess, torch.func.functional_call(self.reward, fixed, (imagined,))


@sick(
    "contact17b-agent-sampled",
    [("DEAD", "actor")],
    no_gradient("actor"),
    source="https://github.com/epignatelli/navix/pull/152",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def agent_sampled(sick: bool, width: int) -> Setup:
    """An actor trained by backpropagation of the imagined reward through a sampled discrete action: sampling
    has no gradient, so that, with no bonus for entropy, the actor gets none. Repair: straight-through."""
    w = normal(seeded(35), 6, 5)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        state = normal(g, 64, 6)
        tried = functional.one_hot(choice(g, 5, 64), 5).float()
        return (state, tried), (torch.tanh(state @ w) * tried).sum(1, keepdim=True)

    def loss(output: tuple[Tensor, Tensor], reward: Tensor) -> Tensor:
        guess, imagined = output
        return functional.mse_loss(guess, reward) - imagined.mean()

    return setup(Imagination(width, through=not sick), sample, loss, 5e-3)


# ---------------------------------------------------------------------------------------- physics


class Poisson(nn.Module):
    """Returns the weighted residual of -u'' = f inside, and the weighted error of u at the boundary."""

    def __init__(self, width: int, weight: float, edge: float, wave: float = 3 * math.pi) -> None:
        super().__init__()
        self.net = stack(
            layer1=nn.Linear(1, width),
            act1=nn.Tanh(),
            layer2=nn.Linear(width, width),
            act2=nn.Tanh(),
            out=nn.Linear(width, 1),
        )
        self.weight, self.edge, self.wave = weight, edge, wave
        with torch.no_grad():
            self.net.layer1.weight.mul_(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        u = self.net(x)
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        residual = second + self.wave**2 * torch.sin(self.wave * x)
        error = self.net(torch.tensor([[0.0], [1.0]])) - torch.tensor([[0.5], [-0.5]])
        return self.weight * residual, self.edge * error


def outweighs(above: float) -> Claim:
    """The first term's gradient is above a multiple of the second's, over the parameters, at the start."""

    def claim(ready: Setup) -> tuple[bool, str]:
        norms = []
        for term in call(ready.model, ready.make_batch()):
            loss = term.square().mean()
            grads = torch.autograd.grad(
                loss, list(ready.model.parameters()), retain_graph=True, allow_unused=True
            )
            norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None)))
        return norms[0] > above * norms[1], f"gradient norms of the two terms: {norms[0]:.3g}, {norms[1]:.3g}"

    return claim


def neglected(*, steps: int = 120) -> Claim:
    """After some steps of training the second term is larger than it was at the start."""

    def claim(ready: Setup) -> tuple[bool, str]:
        before = float(call(ready.model, ready.make_batch())[1].detach().square().mean())
        for _ in training(ready, steps):
            pass
        after = float(call(ready.model, ready.make_batch())[1].detach().square().mean())
        return after > before, f"second term {before:.3g} before, {after:.3g} after {steps} steps"

    return claim


@sick(
    "contact17b-physics-boundary",
    [("EXPLODING", "*")],
    every(outweighs(100), neglected()),
    allow=("BOTTLENECK", "UNSTABLE"),
    source="https://github.com/zenoxml/SciREX/issues/62",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def physics_boundary(sick: bool, width: int) -> Setup:
    """A physics-informed network whose residual, of the order of the wave number squared, drowns the boundary
    condition: the total loss falls and the solution is wrong. Repair: scale the terms to the same size."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return uniform(g, 64, 1), torch.zeros(1)

    def loss(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        return sum(term.square().mean() for term in output)

    model = Poisson(width, 1.0, 1.0) if sick else Poisson(width, 1 / 16, 2.0)
    return setup(model, sample, loss, adam(5e-3))
