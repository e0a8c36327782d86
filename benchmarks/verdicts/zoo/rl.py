"""Reinforcement learning: policies, values, and the numbers that the environment hands out."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import every, flat, jumps, no_gradient, not_finite, rises, strong
from .data import Setup, choice, frozen, normal, seeded, setup, sgd, stack, uniform
from .registry import FLOAT32, healthy, sick

STATE, ACTIONS = 8, 4


class Agent(nn.Module):
    """A trunk with a policy and a value; the output is (logits, value)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = stack(fc=nn.Linear(STATE, width), act=nn.Tanh())
        self.policy, self.value = nn.Linear(width, ACTIONS), nn.Linear(width, 1)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actions' logits and the value of every state."""
        h = self.trunk(s)
        return self.policy(h), self.value(h).squeeze(-1)


def bandit(g: torch.Generator, number: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, actions taken at random, and rewards, best for the action that the state points to."""
    states, actions = normal(g, number, STATE), choice(g, ACTIONS, number)
    worth = states @ normal(seeded(41), STATE, ACTIONS) / math.sqrt(STATE)
    return states, actions, worth.gather(1, actions[:, None]).squeeze(1) + 0.1 * normal(g, number)


def taken(logits: Tensor, actions: Tensor) -> Tensor:
    """Return the log probabilities of the actions."""
    return logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)


@sick("rl-log-probabilities-from-the-buffer", [("DEAD", "policy")], no_gradient("policy"))
def from_the_buffer(sick: bool, width: int) -> Setup:
    """The policy's loss takes the log probabilities that were stored when acting, which are constants; they
    are to be computed again. The value learns, so the loss falls."""
    net = Agent(width)
    old = copy.deepcopy(net)

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        states, actions, rewards = bandit(g)
        with torch.no_grad():
            stored = taken(old(states)[0], actions)
        return states, (actions, rewards, stored)

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        (logits, value), (actions, rewards, stored) = output, target
        gain = (rewards - value).detach()
        log = stored if sick else taken(logits, actions)
        return -(log * gain).mean() + F.mse_loss(value, rewards)

    return setup(net, sample, loss, 1e-2)


@sick(
    "rl-squashed-action-at-its-end",
    [("NUMERICAL", "*")],
    not_finite(),
    allow=["SATURATION"],
    dtypes=(FLOAT32,),
    source="https://arxiv.org/abs/1812.05905",
)
def squashed_action(sick: bool, width: int) -> Setup:
    """The log probability of a squashed action takes log(1 - tanh(u)^2), and tanh is exactly one for large u;
    2 (log 2 - u - softplus(-2u)) is the same number without that point."""

    class Actor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stack(fc=nn.Linear(STATE, width), act=nn.ReLU())
            self.mean, self.logstd = nn.Linear(width, 2), nn.Linear(width, 2)

        def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(s)
            mean, logstd = self.mean(h), self.logstd(h).clamp(-5, 2)
            return mean + logstd.exp() * torch.randn_like(mean), logstd

    net = Actor()
    with torch.no_grad():
        net.mean.weight.mul_(15.0)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        s = normal(g, 32, STATE)
        return s, torch.tanh(s[:, :2])

    def loss(output: tuple[Tensor, Tensor], best: Tensor) -> Tensor:
        u, logstd = output
        a = torch.tanh(u)
        slope = torch.log(1 - a.square()) if sick else 2 * (math.log(2) - u - F.softplus(-2 * u))
        entropy = (logstd + slope).sum(-1)
        return (a - best).square().sum(-1).mean() - 0.05 * entropy.mean()

    return setup(net, sample, loss, 1e-2)


@sick("rl-advantage-of-one-sample", [("NUMERICAL", "*")], not_finite(loss=True))
def advantage_of_one(sick: bool, width: int) -> Setup:
    """Advantages are divided by their standard deviation, and now and then a batch has one step only, whose
    deviation is 0/0; skip the division there."""

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        states, actions, rewards = bandit(g, 1 if float(uniform(g, 1)) < 0.25 else 32)
        return states, (actions, rewards)

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        (logits, value), (actions, rewards) = output, target
        gain = (rewards - value).detach()
        if sick or len(gain) > 1:
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        return -(taken(logits, actions) * gain).mean() + F.mse_loss(value, rewards)

    return setup(Agent(width), sample, loss, 1e-2, seed=1)


@sick("rl-entropy-of-forbidden-actions", [("NUMERICAL", "*")], not_finite())
def entropy_of_forbidden(sick: bool, width: int) -> Setup:
    """Forbidden actions get a probability of exactly zero, and the entropy takes p log p of it; a logit of
    -1e4 in place of -inf would do."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.agent = Agent(width)

        def forward(self, s: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
            logits, value = self.agent(s)
            return logits.masked_fill(~allowed, -math.inf if sick else -1e4), value

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        states, actions, rewards = bandit(g)
        allowed = uniform(g, 32, ACTIONS) < 0.7
        allowed[torch.arange(32), actions] = True
        return (states, allowed), (actions, rewards)

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        (logits, value), (actions, rewards) = output, target
        p = logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean() if sick else -(p * logits.log_softmax(-1)).sum(-1).mean()
        return (
            -(taken(logits, actions) * (rewards - value).detach()).mean()
            + F.mse_loss(value, rewards)
            - 0.01 * entropy
        )

    return setup(Masked(), sample, loss, 1e-2)


@sick(
    "rl-actor-at-its-bounds",
    [("SATURATION", "actor")],
    flat("actor.act1", "tanh", 0.8),
    allow=["VANISHING", "DEAD"],
    source="https://arxiv.org/abs/1511.04143",
)
def actor_at_bounds(sick: bool, width: int) -> Setup:
    """Joint angles in degrees go into an actor that ends in a tanh: all actions are at their bounds, and the
    critic's advice does not get through. In units of the half circle they do."""
    net = stack(
        actor=stack(fc0=nn.Linear(STATE, width), act0=nn.ReLU(), fc1=nn.Linear(width, 2), act1=nn.Tanh())
    )

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        angle = 360 * uniform(g, 32, STATE) - 180
        return angle if sick else angle / 180, 0.5 * torch.sin(angle[:, :2] / 57)

    return setup(net, sample, lambda a, best: (a - best).square().mean(), 3e-3)


@sick(
    "rl-rewards-in-cents",
    [("EXPLODING", "*")],
    every(rises(100.0), strong("q", 1e3)),
    allow=["UNSTABLE", "NUMERICAL", "DEAD"],
)
def rewards_in_cents(sick: bool, width: int) -> Setup:
    """Profits of thousands of euros, counted in cents, are the targets of a Q head under a squared error, and
    the first steps of plain descent throw it out."""
    net = stack(body=stack(fc=nn.Linear(STATE, width), act=nn.ReLU()), q=nn.Linear(width, ACTIONS))

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        states, actions, rewards = bandit(g)
        return states, (actions, (4e5 if sick else 1.0) * rewards)

    def loss(q: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(q.gather(1, target[0][:, None]).squeeze(1), target[1])

    return setup(net, sample, loss, sgd(0.05))


@sick(
    "rl-weights-without-a-cap",
    [("UNSTABLE", "*")],
    jumps(20.0),
    allow=["EXPLODING"],
    source="https://arxiv.org/abs/1611.01224",
)
def weights_without_cap(sick: bool, width: int) -> Setup:
    """Rollouts of another policy are weighted by the ratio of the two, whose tail is long: now and then one
    step in a thousand is the whole gradient. Cap the ratio."""
    net = Agent(width)

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        states, actions, rewards = bandit(g)
        return states, (actions, rewards, -math.log(ACTIONS) - (3.5 * normal(g, 32)).abs())

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        (logits, value), (actions, rewards, stored) = output, target
        ratio = (taken(logits, actions).detach() - stored).exp()
        ratio = ratio if sick else ratio.clamp(max=1.0)
        gain = (rewards - value).detach()
        return -(ratio * taken(logits, actions) * gain).mean() + (ratio * (value - rewards).square()).mean()

    return setup(net, sample, loss, 3e-3)


@sick(
    "rl-ratios-all-clipped",
    [("SATURATION", "policy")],
    no_gradient("*"),
    allow=["DEAD", "VANISHING"],
    source="https://arxiv.org/abs/1707.06347",
    falls_to=0.93,
)
def ratios_all_clipped(sick: bool, width: int) -> Setup:
    """Rewards are all positive and have no baseline, and the stored log probabilities are of another
    temperature: every ratio lies beyond the clip on the side where it gives nothing."""
    net = stack(body=stack(fc=nn.Linear(STATE, width), act=nn.Tanh()), policy=nn.Linear(width, ACTIONS))
    old = copy.deepcopy(net)

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        states, actions, rewards = bandit(g, 256)
        with torch.no_grad():
            stored = taken(old(states), actions)
        return states, (actions, rewards.abs() if sick else rewards, stored - (1.5 if sick else 0.0))

    def loss(logits: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        actions, gain, stored = target
        ratio = (taken(logits, actions) - stored).exp()
        return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean() + 0.3

    return setup(net, sample, loss, 2e-3)


@healthy("rl-ok-actor-critic")
def ok_actor_critic(width: int) -> Setup:
    """Actor and critic over one trunk: noisy, and the value's gradient is larger than the policy's."""

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        (logits, value), (actions, rewards) = output, target
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        return (
            -(taken(logits, actions) * (rewards - value).detach()).mean()
            + F.mse_loss(value, rewards)
            - 0.02 * entropy
        )

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        states, actions, rewards = bandit(g, 64)
        return states, (actions, rewards)

    return setup(Agent(width), sample, loss, 1e-2)


@healthy("rl-ok-target-network", no_gradient("target"), source="https://arxiv.org/abs/1312.5602")
def ok_target_network(width: int) -> Setup:
    """A Q network and its frozen copy, which gives the targets and follows from time to time only."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = stack(fc=nn.Linear(STATE, width), act=nn.ReLU(), out=nn.Linear(width, ACTIONS))
            self.target = frozen(copy.deepcopy(self.q))

        def forward(self, s: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                best = self.target(after).amax(-1)
            return self.q(s), best

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        states, actions, rewards = bandit(g)
        return (states, 0.9 * states + 0.1 * normal(g, 32, STATE)), (actions, rewards)

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        (q, best), (actions, rewards) = output, target
        return F.smooth_l1_loss(q.gather(1, actions[:, None]).squeeze(1), rewards + 0.5 * best)

    return setup(Pair(), sample, loss, 5e-3)


@healthy("rl-ok-some-ratios-clipped", source="https://arxiv.org/abs/1707.06347", falls_to=0.95)
def ok_some_clipped(width: int) -> Setup:
    """Some passes over the same rollouts: a part of the ratios is beyond the clip, and gives nothing."""
    net = Agent(width)
    old = copy.deepcopy(net)

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        states, actions, rewards = bandit(g, 64)
        with torch.no_grad():
            stored = taken(old(states)[0], actions)
        return states, (actions, rewards, stored)

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        (logits, value), (actions, rewards, stored) = output, target
        gain = (rewards - value).detach()
        ratio = (taken(logits, actions) - stored).exp()
        return (
            0.5 * F.mse_loss(value, rewards)
            - torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        )

    return setup(net, sample, loss, 3e-3)
