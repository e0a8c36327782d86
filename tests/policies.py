"""Small seeded policies, each with states, actions and a loss, for the tests of everything about policies."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F

STATE, ACTIONS, SAMPLES = 4, 3, 32


@attrs.frozen
class Batch:
    """States, discrete and continuous actions taken in them, and returns."""

    states: Tensor
    choices: Tensor
    moves: Tensor
    returns: Tensor


def batch(dtype: torch.dtype = torch.float32, samples: int = SAMPLES) -> Batch:
    g = torch.Generator().manual_seed(7)
    return Batch(
        torch.randn(samples, STATE, generator=g, dtype=dtype),
        torch.randint(0, ACTIONS, (samples,), generator=g),
        torch.randn(samples, 2, generator=g, dtype=dtype),
        2 + torch.randn(samples, generator=g, dtype=dtype),
    )


class ActorCritic(nn.Module):
    """The usual form: one shared layer, an actor that gives probabilities, a critic."""

    def __init__(self) -> None:
        super().__init__()
        self.affine1 = nn.Linear(STATE, 16)
        self.action_head, self.value_head = nn.Linear(16, ACTIONS), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.affine1(x))
        return F.softmax(self.action_head(h), dim=-1), self.value_head(h)


class Plain(nn.Module):
    """A trunk and two heads without telling names; the output is what `form` makes of (logits, value)."""

    def __init__(self, form: Any = lambda logits, value: (logits, value)) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(STATE, 16), nn.Linear(16, ACTIONS), nn.Linear(16, 1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        h = self.fc1(x).tanh()
        return self.form(self.fc2(h), self.fc3(h))


class Gaussian(nn.Module):
    """Two trunks; a mean that depends on the state, and a log_std that does not."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(STATE, 16), nn.Tanh(), nn.Linear(16, 2))
        self.critic = nn.Sequential(nn.Linear(STATE, 16), nn.Tanh(), nn.Linear(16, 1))
        self.log_std = nn.Parameter(torch.zeros(2))
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.actor(x), self.log_std), self.critic(x)


class Mixed(nn.Module):
    """A choice of two, one of three, and a move in two dimensions, from two heads; the output is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(STATE, 16)
        self.choose, self.move, self.worth = nn.Linear(16, 5), nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.body(x).tanh()
        return {"choice": self.choose(h), "move": self.move(h).chunk(2, -1), "value": self.worth(h)}


def policy_loss(log_prob: Tensor, value: Tensor, returns: Tensor) -> Tensor:
    return -(log_prob * (returns - value.detach().flatten())).mean()


def value_loss(value: Tensor, returns: Tensor) -> Tensor:
    return F.mse_loss(value.flatten(), returns)


def actor_critic_loss(data: Batch) -> Any:
    """Return the loss of (a categorical distribution, its probabilities or logits; value)."""

    def loss(output: tuple[Any, Tensor]) -> Tensor:
        given, value = output
        d = given if isinstance(given, distributions.Distribution) else distributions.Categorical(given)
        return policy_loss(d.log_prob(data.choices), value, data.returns) + value_loss(value, data.returns)

    return loss


def gaussian_loss(data: Batch) -> Any:
    """Return the loss of (a distribution of moves, value)."""

    def loss(output: tuple[distributions.Distribution, Tensor]) -> Tensor:
        d, value = output
        log_prob = d.log_prob(data.moves.clamp(-0.9, 0.9))
        log_prob = log_prob.sum(-1) if log_prob.dim() > 1 else log_prob
        return policy_loss(log_prob, value, data.returns) + value_loss(value, data.returns)

    return loss


def mixed_loss(data: Batch) -> Any:
    """Return the loss of a `Mixed`'s output."""

    def loss(output: dict[str, Any]) -> Tensor:
        first, second = output["choice"].split([2, 3], -1)
        mean, log_std = output["move"]
        log_prob = (
            distributions.Categorical(logits=first).log_prob(data.choices % 2)
            + distributions.Categorical(logits=second).log_prob(data.choices)
            + distributions.Normal(mean, log_std.exp()).log_prob(data.moves).sum(-1)
        )
        return policy_loss(log_prob, output["value"], data.returns) + value_loss(
            output["value"], data.returns
        )

    return loss
