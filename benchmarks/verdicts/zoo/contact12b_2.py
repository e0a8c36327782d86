"""Reinforcement learning, survival and tabular models, after public reports of training trouble."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import every, huge, jumps, no_gradient, weak
from .data import Sample, adam, choice, frozen, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, sick

# --------------------------------------------------------------------------- survival from whole volumes


class VolumeNet(nn.Module):
    """A small 3-D convolutional network that gives the log hazard of a scan."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, width // 4, 3, padding=1)
        self.conv = nn.Conv3d(width // 4, width // 2, 3, stride=2, padding=1)
        self.head = nn.Sequential(nn.Linear(width // 2, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, scans: Tensor) -> Tensor:
        """Return one log hazard per scan."""
        x = F.relu(self.conv(F.relu(self.stem(scans))))
        return self.head(x.mean((2, 3, 4)))[:, 0]


def _scans(number: int) -> Sample:
    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        burden = normal(g, number)
        x = 0.3 * normal(g, number, 1, 6, 6, 6)
        x[:, :, 1:5, 1:5, 1:5] += burden[:, None, None, None, None]
        time = -torch.log(uniform(g, number).clamp_min(1e-4)) * torch.exp(-3 * burden)
        event = (uniform(g, number) < 0.85).float() if number > 1 else torch.ones(1)
        return x, (time, event)

    return sample


def _partial(log_hazard: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    time, event = target
    order = time.argsort(descending=True)
    log_hazard, event = log_hazard[order], event[order]
    return -((log_hazard - torch.logcumsumexp(log_hazard, 0)) * event).sum() / event.sum().clamp_min(1)


@sick(
    "contact12b-cox-scans",
    [("DEAD", "*")],
    no_gradient("*"),
    source="https://github.com/Novartis/torchsurv/issues/35",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def cox(sick: bool, width: int) -> Setup:
    """Memory allows one scan per batch, and in a risk set of one the Cox partial likelihood is 0 whatever the
    hazard: no gradient at all. Repair: batches of many patients, who are ranked against each other."""
    return setup(VolumeNet(width), _scans(1 if sick else 24), _partial, adam(3e-3))


# ------------------------------------------------------------------------------ survival from a table


class DeepSurv(nn.Module):
    """DeepSurv: dense layers with batch norm and SELU, and a linear risk."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.dense_1, self.bn_1 = nn.Linear(features, width), nn.BatchNorm1d(width)
        self.dense_2, self.bn_2 = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.risk = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the log risk of every patient."""
        x = self.bn_1(F.selu(self.dense_1(x)))
        return self.risk(self.bn_2(F.selu(self.dense_2(x))))[:, 0]


def _patients(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = normal(g, 24, 6)
    time = -torch.log(uniform(g, 24).clamp_min(1e-4)) * torch.exp(-3 * (x[:, 0] - x[:, 1]))
    limit = -1.2 * torch.log(uniform(g, 24).clamp_min(1e-4))
    return x, (torch.minimum(time, limit), (time <= limit).float())


@sick(
    "contact12b-deepsurv-events",
    [("UNSTABLE", "*")],
    jumps(5),
    allow=["EXPLODING", "NUMERICAL"],
    source="https://github.com/arturomoncadatorres/deepsurvk/issues/83",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def events(sick: bool, width: int) -> Setup:
    """The event indicator was standardised with the other columns: its sum, by which the loss is divided, is
    near zero with either sign, so that steps are huge and often point uphill. Repair: leave it 0 and 1."""

    def loss(log_risk: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        time, event = target
        order = time.argsort(descending=True)
        log_risk, event = log_risk[order], event[order]
        if sick:
            event = (event - 0.4933) / 0.5
        return -((log_risk - torch.logcumsumexp(log_risk, 0)) * event).sum() / event.sum()

    return setup(DeepSurv(6, width), _patients, loss, adam(5e-3))


# ----------------------------------------------------------------------------------- soft actor-critic


class Actor(nn.Module):
    """A Gaussian policy with a fixed critic; gives the critic's value and the log-probability."""

    def __init__(self, states: int, actions: int, width: int, *, relu: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(states, width), nn.Linear(width, width)
        self.mu_head, self.log_std_head = nn.Linear(width, actions), nn.Linear(width, actions)
        self.relu = relu
        self.critic = frozen(nn.Linear(states, actions, bias=False))

    def forward(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value of a sampled action and its log-probability."""
        x = F.relu(self.fc2(F.relu(self.fc1(state))))
        mu, log_std = self.mu_head(x), self.log_std_head(x)
        log_std = (F.relu(log_std) if self.relu else log_std).clamp(-20, 2)
        action = mu + log_std.exp() * noise
        value = -4 * (action - 2 * self.critic(state)).square().sum(-1)
        return value, (-0.5 * noise.square() - log_std - 0.92).sum(-1)


def _states(size: int, actions: int) -> Sample:
    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (normal(g, 64, size), normal(g, 64, actions)), torch.zeros(())

    return sample


@sick(
    "contact12b-sac-logstd",
    [("DEAD", "log_std_head")],
    no_gradient("log_std_head", after=19),
    source="https://github.com/sweetice/Deep-reinforcement-learning-with-pytorch/issues/36",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def log_std(sick: bool, width: int) -> Setup:
    """The head of the log standard deviation goes through a ReLU: wanting less noise than a deviation of one,
    it is pushed below zero in every state and never gets a gradient again. Repair: no ReLU on a logarithm."""

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        value, log_prob = output
        return (0.2 * log_prob - value).mean()

    return setup(Actor(6, 2, width, relu=sick), _states(6, 2), loss, adam(1e-2))


# -------------------------------------------------------------------------------- shared actor and critic


class ActorCritic(nn.Module):
    """A policy and a value head on one trunk, as PPO trains them with a joint loss."""

    def __init__(self, states: int, actions: int, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(states, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.pi, self.vf = nn.Linear(width, actions), nn.Linear(width, 1)
        nn.init.normal_(self.pi.weight, std=0.01)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the policy's logits and the value."""
        x = self.trunk(states)
        return self.pi(x), self.vf(x)[:, 0]


def _returns(scale: float) -> Sample:
    good = normal(seeded(21), 6, 4)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        states, actions = normal(g, 128, 6), choice(g, 4, 128)
        hit = (states @ good).argmax(-1) == actions
        returns = 800 + 900 * states[:, 0] + 400 * hit.float()
        return states, (actions, scale * returns, hit.float() - 0.25)

    return sample


def _ppo(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    logits, values = output
    actions, returns, advantage = target
    log_probs = logits.log_softmax(-1)
    taken = log_probs.gather(1, actions[:, None])[:, 0]
    ratio = (taken - torch.log(torch.tensor(0.25))).exp()
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.5, 2.0) * advantage).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    return policy + 0.5 * F.mse_loss(values, returns) - 0.01 * entropy


@sick(
    "contact12b-ppo-returns",
    [("EXPLODING", "*")],
    every(huge("vf", 1e2), weak("pi", "vf", 1e-3, steps=1)),
    allow=["UNSTABLE"],
    source="https://github.com/vwxyzjn/cleanrl/issues/441",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def returns(sick: bool, width: int) -> Setup:
    """Returns of thousands: the squared value error and its gradient are six orders above the policy's, and
    the shared trunk learns for the value alone. Repair: rewards scaled to about one."""
    return setup(ActorCritic(6, 4, width), _returns(1.0 if sick else 1e-3), _ppo, adam(3e-3))


# ------------------------------------------------------------------------------ few-shot feature attention


class FeatureAttention(nn.Module):
    """Prototype network that weighs feature dimensions by a convolution over the support set."""

    def __init__(self, features: int, width: int, shots: int, *, last: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width))
        self.conv1 = nn.Conv2d(1, 8, (shots, 1), padding=(shots // 2, 0))
        self.conv2 = nn.Conv2d(8, 16, (shots, 1), padding=(shots // 2, 0))
        self.conv_final = nn.Conv2d(16, 1, (shots, 1), stride=(shots, 1))
        self.act = last

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        """Return the negative weighted distances of queries to the classes' prototypes."""
        support, query = self.encoder(support), self.encoder(query)
        score = F.relu(self.conv2(F.relu(self.conv1(support[:, None]))))
        score = self.act(self.conv_final(score))[:, 0, 0]
        distance = (query[:, None] - support.mean(1)[None]).square()
        return -(distance * score[None]).sum(-1)


def _episodes(classes: int, shots: int, features: int) -> Sample:
    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        centres = torch.zeros(classes, features)
        centres[:, : features // 2] = 1.5 * normal(g, classes, features // 2)
        support = centres[:, None] + normal(g, classes, shots, features)
        kind = choice(g, classes, 24)
        return (support, centres[kind] + normal(g, 24, features)), kind

    return sample


@sick(
    "contact12b-hatt-relu",
    [("DEAD", "*")],
    no_gradient("*"),
    source="https://github.com/thunlp/HATT-Proto/issues/6",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def hatt(sick: bool, width: int) -> Setup:
    """A ReLU on top of the feature attention: where the last convolution starts below zero all weights are 0,
    all distances are 0, and nothing in the network gets a gradient. Repair: LeakyReLU there."""
    model = FeatureAttention(12, width, 5, last=nn.ReLU() if sick else nn.LeakyReLU(0.1))
    with torch.no_grad():
        model.conv_final.bias.fill_(-0.3)
    return setup(model, _episodes(5, 5, 12), F.cross_entropy, adam(3e-3))
