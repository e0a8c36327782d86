"""Agents that did not learn, and more that was as it should be: agents and series."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, flat, loss_of, rises, training, weak
from .data import Sample, choice, frozen, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, healthy, sick


class Agent(nn.Module):
    """A policy and a value on a shared trunk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = stack(
            one=nn.Linear(6, width), act1=nn.Tanh(), two=nn.Linear(width, width), act2=nn.Tanh()
        )
        self.policy, self.value = nn.Linear(width, 4), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.policy(x), self.value(x)[:, 0]


def rollout(scaled: bool) -> Sample:
    """Return states, with actions taken at random and their returns, of hundreds or scaled to about one."""
    w = normal(seeded(37), 6, 4) / math.sqrt(6)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = normal(g, 64, 6)
        action = choice(g, 4, 64)
        gain = (x @ w).gather(1, action[:, None])[:, 0]
        gain, base = gain + 0.1 * normal(g, 64), 2 * torch.tanh(x[:, 0])
        advantage = (gain - gain.mean()) / gain.std()
        returns = gain + base if scaled else 500 + 300 * (gain + base)
        return x, (action, advantage, returns)

    return sample


def clipped_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, ...]) -> Tensor:
    """Return the clipped policy loss plus half the value's."""
    (logits, value), (action, advantage, returns) = output, target
    log = logits.log_softmax(-1).gather(1, action[:, None])[:, 0]
    ratio = (log - math.log(0.25)).exp()
    policy = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    return 0.5 * F.mse_loss(value, returns) - policy


@sick(
    "contact15a-agent-returns",
    [("EXPLODING", "*")],
    weak("policy", "value", 1e-2),
    allow=("BOTTLENECK", "UNSTABLE"),
    source="https://github.com/DLR-RM/stable-baselines3/issues/1533",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def agent_returns(sick: bool, width: int) -> Setup:
    """Returns of hundreds make a value loss of a hundred thousand beside a policy loss of less than one, on a
    shared trunk that hears only the value. Returns scaled to about one repair it."""
    return setup(Agent(width), rollout(not sick), clipped_loss, 3e-3)


class Critic(nn.Module):
    """The values of four actions, and those of the next state by a copy that follows at a rate."""

    def __init__(self, width: int, follows: float) -> None:
        super().__init__()
        self.follows = follows
        self.net, self.copy = self.layers(width), frozen(self.layers(width))
        self.copy.load_state_dict(self.net.state_dict())

    @staticmethod
    def layers(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def forward(self, x: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        for mean, new in zip(self.copy.parameters(), self.net.parameters(), strict=True):
            mean.data.lerp_(new.data, self.follows)
        return self.net(x), self.copy(following)


def transitions() -> Sample:
    """Return transitions of a slow system, with rewards of about one."""
    w = normal(seeded(38), 6, 4) / math.sqrt(6)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        x, action = normal(g, 128, 6), choice(g, 4, 128)
        following = 0.95 * x + 0.3 * normal(g, 128, 6)
        reward = torch.tanh(2 * x @ w).gather(1, action[:, None])[:, 0]
        return (x, following), (action, reward, uniform(g, 128) < 0.1)

    return sample


def soft_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the squared error of the soft Bellman equation."""
    (values, ahead), (action, reward, done) = output, target
    soft = 0.1 * (ahead / 0.1).logsumexp(-1)
    goal = reward + 0.99 * soft * ~done
    return F.mse_loss(values.gather(1, action[:, None])[:, 0], goal)


@sick(
    "contact15a-agent-critic",
    [("UNSTABLE", "*")],
    rises(5.0),
    allow=("EXPLODING", "NUMERICAL"),
    source="https://github.com/Div-Infinity/IQ-Learn/issues/11",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def agent_critic(sick: bool, width: int) -> Setup:
    """A critic whose targets are its own newest values is trained at a rate too high for it: values, targets
    and loss run away. A lower rate, and a copy for the targets that follows slowly, repair it."""
    return setup(Critic(width, 1.0 if sick else 0.005), transitions(), soft_loss, 0.1 if sick else 5e-3)


def better_at_rest(share: float, *, steps: int = 100) -> Claim:
    """After some steps the loss without dropout is below a part of the loss with it."""

    def claim(ready: Setup) -> tuple[bool, str]:
        loud = [step.loss for step in training(ready, steps)][-10:]
        ready.model.eval()
        calm = sum(loss_of(ready).item() for _ in range(10))
        ready.model.train()
        return calm < share * sum(loud), f"loss at rest / in training = {calm / sum(loud):.2g}"

    return claim


def fed_nan(share: float) -> Claim:
    """More than a share of the input is NaN."""

    def claim(ready: Setup) -> tuple[bool, str]:
        seen = float(ready.make_batch().isnan().float().mean())
        return seen > share, f"{seen:.0%} of the input is NaN"

    return claim


class Policy(nn.Module):
    """A policy that returns the ratio of its probability of an action to the one it has just had."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = stack(one=nn.Linear(6, width), act=nn.Tanh(), out=nn.Linear(width, 4))
        self.ratio = Ratio()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ratio(self.net(x).log_softmax(-1))


class Ratio(nn.Module):
    """Draws actions; returns their ratio of probabilities to themselves, and them."""

    def __init__(self) -> None:
        super().__init__()
        self.g = seeded(42)

    def forward(self, log: Tensor) -> tuple[Tensor, Tensor]:
        action = torch.multinomial(log.detach().exp(), 1, generator=self.g)
        chosen = log.gather(1, action)
        return (chosen - chosen.detach()).exp(), action


def bandit() -> Sample:
    """Return states; the target is what each action is worth there."""
    w = normal(seeded(43), 6, 4)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 6)
        return x, F.one_hot((x @ w).argmax(-1), 4).float()

    return sample


def surrogate(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Return the clipped surrogate loss, with the reward as the advantage."""
    ratio, action = output
    reward = target.gather(1, action)
    return -torch.minimum(ratio * reward, ratio.clamp(0.8, 1.2) * reward).mean()


@healthy(
    "contact15a-healthy-ratio",
    flat("ratio", "clamp", 0.99),
    source="https://github.com/huggingface/trl/issues/2769",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def ratio(width: int) -> Setup:
    """One update for every batch of actions: the ratio to the policy that drew them is exactly one, always,
    and the clip never acts, while the gradient is that of the policy. The loss is minus the mean reward."""
    return setup(Policy(width), bandit(), surrogate, 1e-2)


class Wind(nn.Module):
    """A forecast from a window of speeds, with dropout in every layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.place = nn.Parameter(0.1 * torch.randn(12, width))
        self.body = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.3, batch_first=True, norm_first=True)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.embed(x) + self.place)
        return self.out(self.drop(x.mean(1)))


def winds() -> Sample:
    """Return windows of three waves; the target is how the first one goes on."""
    time = torch.arange(16) / 6

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        phase = 6.3 * uniform(g, 64, 1, 3)
        x = torch.sin(time[:, None] + phase) + 0.05 * normal(g, 64, 16, 3)
        return x[:, :12], x[:, 12:, 0]

    return sample


@healthy(
    "contact15a-healthy-dropout",
    better_at_rest(0.7),
    source="https://github.com/LarsBentsen/FFTransformer/issues/7",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def dropout(width: int) -> Setup:
    """The loss in training stays noisy and well above that at rest, where the dropout is off: that is what
    dropout does, and nothing to worry about."""
    return setup(Wind(width), winds(), F.mse_loss, 3e-3)


class Imputer(nn.Module):
    """Normalizes a series by what is known of it, and puts a learned embedding in for what is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.unknown = nn.Parameter(torch.zeros(width))
        self.embed = nn.Linear(1, width)
        self.body = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        known = ~x.isnan()
        x = x.nan_to_num()
        number = known.sum(1, keepdim=True).clamp(min=1)
        mean = x.sum(1, keepdim=True) / number
        variance = ((x - mean).square() * known).sum(1, keepdim=True) / number
        x = torch.where(known, (x - mean) / (variance + 1e-5).sqrt(), 0.0)
        tokens = torch.where(known[..., None], self.embed(x[..., None]), self.unknown)
        return self.out(self.body(tokens)[0].mean(1))


def gaps() -> Sample:
    """Return series of which more than half is missing, and the class of their shape."""
    time = torch.arange(24) / 24 * 2 * math.pi

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 3, 32)
        x = torch.sin(time * (1.0 + kind[:, None])) + 0.2 * normal(g, 32, 24)
        return (5 + 2 * x).masked_fill(torch.rand(32, 24, generator=g) < 0.55, math.nan), kind

    return sample


@healthy(
    "contact15a-healthy-missing",
    fed_nan(0.5),
    source="https://github.com/Chengyui/NuwaTS/issues/3",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def missing(width: int) -> Setup:
    """More than half of the input is NaN, for what is missing; a learned embedding stands in for it and the
    normalization counts only what is known, so that no NaN gets any further."""
    return setup(Imputer(width), gaps(), F.cross_entropy, 1e-2)
