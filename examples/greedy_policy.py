"""An actor-critic on CartPole that is sure of one action before it has learned which; and its repair.

python examples/greedy_policy.py

Every return of CartPole is positive, so weighing the log probability of an action by its return pushes up
whatever action was taken, and with large steps one action is soon taken always. The repair weighs by the
advantage, the return less the value, standardised; rewards entropy a little; and takes smaller steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

import gradflow as gf

GAMMA, STEPS, UPDATES = 0.99, 256, 40
Batch = tuple[Tensor, tuple[Tensor, Tensor]]


class ActorCritic(nn.Module):
    """A trunk with two heads; the output is (logits of the actions, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both actions, and the value of every state."""
        h = self.trunk(states)
        return self.actor(h), self.critic(h).squeeze(-1)


def rollouts(model: nn.Module) -> Iterator[Batch]:
    """Yield (states, (actions, returns in tens)) of the policy as it is when the next batch is asked for.

    While gradflow draws a batch, the model has the parameters of that step, so this is on policy.
    """
    env = gymnasium.make("CartPole-v1")
    state, _ = env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    while True:
        states, actions, dones = [], [], []
        for _ in range(STEPS):
            x = torch.as_tensor(state)
            with torch.no_grad():
                p = model(x)[0].softmax(-1)
            action = int(torch.multinomial(p, 1, generator=generator))
            state, _, failed, long, _ = env.step(action)
            states.append(x)
            actions.append(action)
            dones.append(failed or long)
            if failed or long:
                state, _ = env.reset()
        returns, after = np.zeros(STEPS), 0.0
        for t in reversed(range(STEPS)):
            after = returns[t] = 1.0 + GAMMA * after * (not dones[t])
        yield torch.stack(states), (torch.tensor(actions), torch.tensor(returns / 10, dtype=torch.float32))


def value_loss(value: Tensor, returns: Tensor) -> Tensor:
    """Return the value's part of the loss, small, so that the policy leads."""
    return 0.05 * F.mse_loss(value, returns)


def greedy_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of the sick model: the returns are taken as they are."""
    (logits, value), (actions, returns) = output, target
    policy = -(Categorical(logits=logits).log_prob(actions) * returns).mean()
    return policy + value_loss(value, returns)


def careful_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of the repair: standardised advantages, and a reward for entropy."""
    (logits, value), (actions, returns) = output, target
    gain = returns - value.detach()
    gain = (gain - gain.mean()) / (gain.std() + 1e-8)
    d = Categorical(logits=logits)
    policy = -(d.log_prob(actions) * gain).mean() - 0.01 * d.entropy().mean()
    return policy + value_loss(value, returns)


def build() -> tuple:
    """Return the sick model."""
    torch.manual_seed(0)
    model = ActorCritic()
    return model, rollouts(model), greedy_loss, torch.optim.Adam(model.parameters(), 0.2)


def repaired() -> tuple:
    """Return the repair."""
    torch.manual_seed(0)
    model = ActorCritic()
    return model, rollouts(model), careful_loss, torch.optim.Adam(model.parameters(), 3e-3)


def learned(builder: Callable[[], tuple]) -> float:
    """Train for a hundred updates, and return how many times as long the pole stands in the end as it did."""
    model, batches, loss_fn, optimizer = builder()
    falls = []
    for _ in range(100):
        states, (actions, returns) = next(batches)
        falls.append(int((returns == returns.min()).sum()))  # the last step of an episode brings one
        loss = loss_fn(model(states), (actions, returns))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(falls[:5]) / sum(falls[-5:])


def main() -> None:
    """Print what gradflow says of the sick model and of the repair, and what either learns."""
    for name, builder in (("sick", build), ("repaired", repaired)):
        model, batches, loss_fn, optimizer = builder()
        analyzer = gf.RLPolicyAnalyzer(model)
        results = analyzer.analyze(batches, loss_fn, steps=UPDATES, optimizer=optimizer)
        print(f"{name}: {'no illness found' if results.report.ok else 'sick'}")
        for cause in results.report.causes:
            print(f"  cause: {cause.issue_type.value} in {cause.layer}")
        found = results.policy_distribution_stats
        print(f"  entropy {found.first_entropy:.1f} -> {found.last_entropy:.1f} nats")
        longer = "longer" if learned(builder) > 2 else "no longer"
        print(f"  after 100 updates the pole stands {longer} than at the start")


if __name__ == "__main__":
    main()
