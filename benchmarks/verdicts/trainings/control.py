"""Trainings of agents, written out: what they learn from is what they did, in small environments."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from .data import Sample, choice, frozen, moving_average, normal, seeded, training, uniform
from .registry import Training, healthy
from .tables import mlp


class Poles:
    """Several poles to be balanced (CartPole-v1), started anew when they fall."""

    def __init__(self, number: int, seed: int) -> None:
        self.envs = [gymnasium.make("CartPole-v1") for _ in range(number)]
        first = [env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)]
        self.seen = torch.tensor(np.stack(first))
        self.lengths, self.length = deque([20.0], maxlen=20), [0] * number

    def act(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Do one step: return what is seen next (before any new start), which fell, and which ended."""
        after, fell, ended = [], [], []
        for i, (env, action) in enumerate(zip(self.envs, actions.tolist(), strict=True)):
            seen, _, down, over, _ = env.step(action)
            after.append(torch.tensor(seen))
            self.length[i] += 1
            if down or over:
                self.lengths.append(float(self.length[i]))
                self.length[i], seen = 0, env.reset()[0]
            self.seen[i] = torch.tensor(seen)
            fell.append(float(down))
            ended.append(float(down or over))
        return torch.stack(after), torch.tensor(fell), torch.tensor(ended)

    def mean_length(self, _: nn.Module | None = None) -> float:
        """Return how long the last twenty poles stood."""
        return float(np.mean(self.lengths))


@healthy("rl-double-q-cartpole", 5000, at_least=100.0)
def double_q() -> Training:
    """Q-learning with a replay buffer, a target net that follows, and two nets against optimism."""
    poles, own = Poles(1, 3), seeded(81)
    model = mlp(4, 64, 64, 2)
    target_net = frozen(copy.deepcopy(model))
    buffer: list[tuple[Tensor, ...]] = []

    def before(step: int) -> None:
        seen, chance = poles.seen.clone(), max(0.03, 1 - step / 1000)
        with torch.no_grad():
            action = model(seen).argmax(1)
        if float(uniform(own, 1)) < chance:
            action = choice(own, 2, 1)
        after, fell, _ = poles.act(action)
        buffer.append((seen[0], action[0], after[0], fell[0]))

    for _ in range(200):
        before(0)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        chosen = choice(g, len(buffer), 64).tolist()
        seen, action, after, fell = (
            torch.stack(column) for column in zip(*(buffer[i] for i in chosen), strict=True)
        )
        with torch.no_grad():
            best = model(after).argmax(1, keepdim=True)
            value = target_net(after).gather(1, best)[:, 0]
        return seen, (action, 1 + 0.98 * (1 - fell) * value)

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return F.smooth_l1_loss(output.gather(1, target[0][:, None])[:, 0], target[1])

    after = moving_average(target_net, model, 0.99)
    return training(model, sample, loss, 1e-3, poles.mean_length, clip=10.0, before=before, after=after)


def discounted(rewards: Tensor, ends: Tensor, last: Tensor, gamma: float) -> Tensor:
    """Return what is earned from each step on (time, poles), starting from the value of what came last."""
    earned, returns = last, []
    for reward, end in zip(rewards.flip(0), ends.flip(0), strict=True):
        earned = reward + gamma * (1 - end) * earned
        returns.append(earned)
    return torch.stack(returns).flip(0)


@healthy("rl-reinforce-cartpole", 150, at_least=80.0)
def reinforce() -> Training:
    """The plain policy gradient: whole episodes are played for every update, within the batch source."""
    model = mlp(4, 32, 2, act=nn.Tanh)
    poles = Poles(8, 5)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        seen, actions, ends, alive = [], [], [], torch.ones(8)
        there = []
        while alive.any() and len(seen) < 200:
            with torch.no_grad():
                action = torch.multinomial(model(poles.seen).softmax(1), 1, generator=g)[:, 0]
            seen.append(poles.seen.clone())
            there.append(alive)
            actions.append(action)
            _, _, ended = poles.act(action)
            ends.append(ended)
            alive = alive * (1 - ended)
        returns = discounted(torch.ones(len(ends), 8), torch.stack(ends), torch.zeros(8), 0.98).flatten()
        kept = torch.stack(there).flatten() > 0
        returns = (returns[kept] - returns[kept].mean()) / (returns[kept].std() + 1e-6)
        return torch.stack(seen).flatten(0, 1)[kept], (torch.stack(actions).flatten()[kept], returns)

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        actions, returns = target
        return (F.cross_entropy(output, actions, reduction="none") * returns).mean()

    return training(model, sample, loss, 1e-2, poles.mean_length)


class Actor(nn.Module):
    """A trunk with a policy and a value."""

    def __init__(self, inputs: int, actions: int, size: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, size), nn.Tanh(), nn.Linear(size, size), nn.Tanh())
        self.policy, self.value = nn.Linear(size, actions), nn.Linear(size, 1)
        nn.init.orthogonal_(self.policy.weight, 0.01)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actions' logits and the value of every state."""
        h = self.trunk(seen)
        return self.policy(h), self.value(h)[:, 0]


def played(poles: Poles, model: nn.Module, steps: int, g: Generator) -> dict[str, Tensor]:
    """Return what was seen, done and earned in some steps, flattened, with the log probabilities then."""
    seen, actions, logs, values, ends = [], [], [], [], []
    with torch.no_grad():
        for _ in range(steps):
            logits, value = model(poles.seen)
            action = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
            seen.append(poles.seen.clone())
            actions.append(action)
            logs.append(Categorical(logits=logits).log_prob(action))
            values.append(value)
            ends.append(poles.act(action)[2])
        last = model(poles.seen)[1]
    returns = discounted(0.1 * torch.ones(steps, len(last)), torch.stack(ends), last, 0.98)
    columns = {"seen": seen, "actions": actions, "logs": logs, "values": values, "returns": list(returns)}
    return {name: torch.stack(column).flatten(0, 1) for name, column in columns.items()}


@healthy("rl-advantage-actor-critic-cartpole", 600, at_least=100.0)
def actor_critic() -> Training:
    """A policy and a value on one trunk, eight poles, sixteen steps for an update, with RMSprop."""
    poles, model = Poles(8, 7), Actor(4, 2, 32)

    def sample(g: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = played(poles, model, 16, g)
        return batch["seen"], batch

    def loss(output: tuple[Tensor, Tensor], target: dict[str, Tensor]) -> Tensor:
        logits, value = output
        choice_ = Categorical(logits=logits)
        gain = (target["returns"] - value).detach()
        told = -(choice_.log_prob(target["actions"]) * gain).mean()
        return told + 0.5 * F.mse_loss(value, target["returns"]) - 0.005 * choice_.entropy().mean()

    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3, alpha=0.99, eps=1e-5)
    return training(model, sample, loss, optimizer, poles.mean_length, clip=0.5)


@healthy("rl-proximal-policy-cartpole", 800, at_least=120.0)
def proximal() -> Training:
    """Proximal policy optimisation: sixteen updates on parts of what was played, then play again."""
    poles, model, own = Poles(8, 9), Actor(4, 2, 32), seeded(82)
    held: dict[str, Any] = {}

    def before(step: int) -> None:
        if step % 16 == 0:
            held.update(played(poles, model, 32, own))

    before(0)

    def sample(g: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = choice(g, len(held["seen"]), 64)
        batch = {name: column[chosen] for name, column in held.items()}
        return batch["seen"], batch

    def loss(output: tuple[Tensor, Tensor], target: dict[str, Tensor]) -> Tensor:
        logits, value = output
        choice_ = Categorical(logits=logits)
        gain = target["returns"] - target["values"]
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        ratio = (choice_.log_prob(target["actions"]) - target["logs"]).exp()
        told = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        return told + 0.5 * F.mse_loss(value, target["returns"]) - 0.01 * choice_.entropy().mean()

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, eps=1e-5)
    return training(model, sample, loss, optimizer, poles.mean_length, clip=0.5, before=before)


@healthy("rl-frozen-lake-table", 1500, at_least=0.9)
def frozen_lake() -> Training:
    """Q-learning of a table of values, as an embedding, on a lake of ice that does not slip."""
    env = gymnasium.make("FrozenLake-v1", is_slippery=False)
    env.action_space.seed(3)
    model = nn.Embedding(16, 4)
    nn.init.zeros_(model.weight)
    moves, state = [], int(env.reset(seed=3)[0])
    for _ in range(6000):
        action = int(env.action_space.sample())
        after, reward, down, over, _ = env.step(action)
        moves.append((state, action, int(after), float(reward), float(down)))
        state = int(env.reset()[0]) if down or over else int(after)
    seen, actions, then, rewards, downs = (torch.tensor(c) for c in zip(*moves, strict=True))

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        chosen = choice(g, len(moves), 64)
        with torch.no_grad():
            value = model(then[chosen]).amax(1)
        return seen[chosen], (actions[chosen], rewards[chosen] + 0.9 * (1 - downs[chosen]) * value)

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(output.gather(1, target[0][:, None])[:, 0], target[1])

    def reaches(net: nn.Module) -> float:
        state, total, over, steps = int(env.reset(seed=1)[0]), 0.0, False, 0
        while not over and steps < 30:
            state, reward, down, late, _ = env.step(int(net(torch.tensor([state])).argmax()))
            total, over, steps, state = total + float(reward), down or late, steps + 1, int(state)
        return total

    return training(model, sample, loss, 2e-2, reaches)


def pushed(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a push takes a point, shape (batch, 2), and what that costs, as a reward."""
    after = (place + 0.3 * action).clamp(-2, 2)
    return after, -after.norm(dim=1, keepdim=True) - 0.05 * action.square().sum(1, keepdim=True)


@healthy("rl-deterministic-policy-critic", 1000, at_least=-0.5, source="https://arxiv.org/abs/1509.02971")
def deterministic() -> Training:
    """The critic's turns of a deterministic policy that pushes a point home; the actor moves in between."""
    actor, critic = nn.Sequential(mlp(2, 32, 32, 2), nn.Tanh()), mlp(4, 48, 48, 1)
    later, judge = frozen(copy.deepcopy(actor)), frozen(copy.deepcopy(critic))
    steps = torch.optim.Adam(actor.parameters(), lr=1e-3)
    follow = [moving_average(later, actor, 0.98), moving_average(judge, critic, 0.98)]
    own = seeded(83)

    def before(step: int) -> None:
        place = 4 * uniform(own, 64, 2) - 2
        steps.zero_grad()
        (-critic(torch.cat([place, actor(place)], 1))).mean().backward()
        steps.step()
        critic.zero_grad()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        place = 4 * uniform(g, 64, 2) - 2
        with torch.no_grad():
            action = (actor(place) + 0.3 * normal(g, 64, 2)).clamp(-1, 1)
            after, reward = pushed(place, action)
            value = judge(torch.cat([after, later(after)], 1))
        return torch.cat([place, action], 1), reward + 0.9 * value

    def after(step: int) -> None:
        for move in follow:
            move(step)

    def reward(_: nn.Module) -> float:
        place, total = 4 * uniform(seeded(98), 256, 2) - 2, 0.0
        for step in range(12):
            place, gain = pushed(place, actor(place))
            total += float(gain.mean()) if step >= 6 else 0.0
        return total / 6

    kept: Sample = sample
    return training(critic, kept, F.mse_loss, 1e-3, reward, before=before, after=after)
