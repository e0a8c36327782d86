"""Four trainings that go bad at a known step, and their healthy twins, each watched by a monitor.

Beside the monitor each takes down, by plain PyTorch and at every step, the number that shows the trouble.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradflow as gf


class Watched(NamedTuple):
    """A training that was watched.

    Args:
        monitor: at its end.
        plain: the number that shows the trouble, by step.
        reports: those of the looks, by step.
    """

    monitor: gf.Monitor
    plain: list[float]
    reports: dict[int, gf.Report]


def watched(monitor: gf.Monitor, steps: Iterator[tuple[object, float]]) -> Watched:
    """Run the steps of a training, each of which yields its batch and the plain number."""
    plain, reports = [], {}
    for step, (batch, number) in enumerate(steps):
        plain.append(number)
        report = monitor(batch)
        if report is not None:
            reports[step] = report
    return Watched(monitor, plain, reports)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# ------------------------------------------------------------------------------- attention that collapses


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.norm2, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.heads = heads

    def split(self, x: Tensor) -> list[Tensor]:
        rows, length, width = x.shape
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        return [t.view(rows, length, self.heads, width // self.heads).transpose(1, 2) for t in parts]

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self.split(x), is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, letters: int, width: int = 48, heads: int = 4, length: int = 32) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(letters, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, letters: Tensor) -> Tensor:
        x = self.token(letters) + self.position(torch.arange(letters.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def entropy_share(self, letters: Tensor) -> float:
        """Return the mean entropy of the attention over its maximum, least of the blocks."""
        x = self.token(letters) + self.position(torch.arange(letters.shape[1]))
        shares = []
        for block in self.blocks:
            q, k, _ = block.split(x)
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)[..., 1:]
            shares.append(float((entropy / torch.arange(2.0, len(future) + 1).log()).mean()))
            x = block(x)
        return min(shares)


def language_model(*, sick: bool, steps: int = 500, every: int = 50) -> Watched:
    """A GPT on English text; when sick, its learning rate is sixty times as high from step 250 on."""
    torch.manual_seed(0)
    text = "".join(pydoc_data.topics.topics.values())[:100_000]
    index = {letter: i for i, letter in enumerate(sorted(set(text)))}
    data = torch.tensor([index[letter] for letter in text])
    model = GPT(len(index))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def trained() -> Iterator[tuple[object, float]]:
        for step in range(steps):
            if sick and step == 250:
                set_rate(optimizer, 0.06)
            starts = torch.randint(0, len(data) - 33, (16,)).tolist()
            rows = torch.stack([data[i : i + 33] for i in starts])
            batch = rows[:, :-1], rows[:, 1:]
            optimizer.zero_grad()
            loss_fn(model(batch[0]), batch[1]).backward()
            optimizer.step()
            yield batch, model.entropy_share(batch[0][:4])

    return watched(gf.Monitor(model, loss_fn, optimizer, every=every), trained())


# ------------------------------------------------------------------------------- rectifiers that die


def digits_network(*, sick: bool, steps: int = 700, every: int = 50) -> Watched:
    """A CNN on digits; when sick, the batch of step 500 has inputs and labels that are wrong."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()

    def trained() -> Iterator[tuple[object, float]]:
        for step in range(steps):
            chosen = torch.randint(0, 1500, (32,))
            x, y = images[chosen], labels[chosen]
            if sick and step == 500:
                x, y = 60 * x, torch.randint(0, 10, (32,))
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                silent = (model[:8](images[:256]) <= 0).all(0).float().mean()
            yield (x, y), float(silent)

    return watched(gf.Monitor(model, loss_fn, optimizer, every=every), trained())


# ------------------------------------------------------------------------------- a posterior that collapses


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ELU())
        self.mean, self.log_variance = nn.Linear(64, 8), nn.Linear(64, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ELU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        return self.decoder(mean + torch.randn_like(mean) * (0.5 * log_variance).exp()), mean, log_variance


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the KL divergence of the posterior from the prior, mean over samples."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()


def variational(*, sick: bool, steps: int = 900, every: int = 50) -> Watched:
    """A VAE on digits; when sick, the weight of its KL term is a thousand times as high from step 500 on."""
    torch.manual_seed(0)
    data = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model, weight = Autoencoder(), [0.02]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss_fn(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        restored, mean, log_variance = output
        return (restored - target).square().sum(1).mean() + weight[0] * divergence(mean, log_variance)

    def trained() -> Iterator[tuple[object, float]]:
        for step in range(steps):
            if sick and step == 500:
                weight[0] = 20.0
            x = data[torch.randint(0, 1500, (64,))]
            output = model(x)
            optimizer.zero_grad()
            loss_fn(output, x).backward()
            optimizer.step()
            yield (x, x), float(divergence(*output[1:]).detach())

    return watched(gf.Monitor(model, loss_fn, optimizer, every=every), trained())


# ------------------------------------------------------------------------------- a policy that collapses


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        self.value = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, states: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        return torch.distributions.Categorical(logits=self.policy(states)), self.value(states).squeeze(-1)


def clipped_loss(
    output: tuple[torch.distributions.Categorical, Tensor], target: tuple[Tensor, ...]
) -> Tensor:
    """Return the loss of proximal policy optimisation (Schulman et al., 2017)."""
    (distribution, values), (actions, old, advantages, returns) = output, target
    ratio = (distribution.log_prob(actions) - old).exp()
    gained = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -gained.mean() + 0.5 * (values - returns).square().mean()


def rollout(
    model: Agent, env: gymnasium.Env, state: np.ndarray, length: int = 256
) -> Iterator[Tensor | np.ndarray]:
    """Yield states, actions, their log-probabilities, advantages, returns, and the state it ends in."""
    states, actions, old, rewards, ends, values = [], [], [], [], [], []
    with torch.no_grad():
        for _ in range(length):
            distribution, value = model(torch.tensor(state))
            action = distribution.sample()
            states.append(torch.tensor(state))
            actions.append(action)
            old.append(distribution.log_prob(action))
            values.append(value)
            state, _, fell, timed_out, _ = env.step(int(action))
            rewards.append(0.05)
            ends.append(fell or timed_out)
            if ends[-1]:
                state, _ = env.reset()
        advantages, after, ahead = torch.zeros(length), model(torch.tensor(state))[1], torch.zeros(())
        for t in reversed(range(length)):
            going_on = 0.0 if ends[t] else 1.0
            ahead = rewards[t] + 0.99 * going_on * after - values[t] + 0.99 * 0.95 * going_on * ahead
            advantages[t], after = ahead, values[t]
    value = torch.stack(values)
    yield from (
        torch.stack(states),
        torch.stack(actions),
        torch.stack(old),
        advantages,
        advantages + value,
        state,
    )


def cart_pole(*, sick: bool, rounds: int = 24, every: int = 40) -> Watched:
    """A PPO agent on CartPole; when sick, its learning rate is 0.3 and not 1e-3 from round 12 on."""
    torch.manual_seed(0)
    env = gymnasium.make("CartPole-v1")
    model = Agent()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    state, _ = env.reset(seed=0)

    def trained() -> Iterator[tuple[object, float]]:
        nonlocal state
        for number in range(rounds):
            if sick and number == 12:
                set_rate(optimizer, 0.3)
            states, actions, old, advantages, returns, state = rollout(model, env, state)
            for _ in range(4):
                for chosen in torch.randperm(len(states)).split(64):
                    weights = advantages[chosen]
                    weights = (weights - weights.mean()) / (weights.std() + 1e-8)
                    batch = states[chosen], (actions[chosen], old[chosen], weights, returns[chosen])
                    optimizer.zero_grad()
                    clipped_loss(model(batch[0]), batch[1]).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    with torch.no_grad():
                        entropy = model(states)[0].entropy().mean()
                    yield batch, float(entropy) / float(np.log(2))

    return watched(gf.Monitor(model, clipped_loss, optimizer, every=every), trained())


Training = Callable[..., Watched]
