"""More builds that look suspicious and train: graphs, forecasts, tables and retrieval."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import huge
from .contact11a_4 import below_zero, even, wide
from .data import choice, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy


class GATConv(nn.Module):
    """Attention to the neighbours of each node."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.lin = nn.Linear(size, out, bias=False)
        self.att_src, self.att_dst = nn.Linear(out, 1, bias=False), nn.Linear(out, 1, bias=False)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Return the weighted mean of the neighbours."""
        x = self.lin(x)
        scores = F.leaky_relu(self.att_dst(x) + self.att_src(x).t(), 0.2)
        return self.softmax(scores.masked_fill(~edges, -torch.inf)) @ x


class GAT(nn.Module):
    """Two attention layers over a fixed graph of papers."""

    def __init__(self, size: int, edges: Tensor) -> None:
        super().__init__()
        self.conv1, self.conv2 = GATConv(24, size), GATConv(size, 4)
        self.register_buffer("edges", edges)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each node's class."""
        return self.conv2(F.elu(self.conv1(x, self.edges)), self.edges)


@healthy(
    "contact11a-gat-even",
    even("conv1.softmax", 0.15),
    source="https://github.com/PetarV-/GAT/issues/64",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def gat_even(width: int) -> Setup:
    """Graph attention where neighbours mostly share their class: the weights of all neighbours are almost the
    same, as if attention did not work; the mean is just what such a graph needs."""
    g = seeded(61)
    kind = choice(g, 4, 80)
    same = kind[:, None] == kind
    edges = (uniform(g, 80, 80) < torch.where(same, 0.25, 0.02)) | torch.eye(80, dtype=torch.bool)
    words = (uniform(seeded(62), 4, 24) < 0.3).float()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        bag = (uniform(g, 80, 24) < 0.1 + 0.3 * words[kind]).float()
        return bag / bag.sum(1, keepdim=True).clamp_min(1), kind

    return setup(GAT(width, edges | edges.t()), sample, F.cross_entropy, 1e-2)


class GaussianDeepAR(nn.Module):
    """A recurrent forecaster with a Gaussian output."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, size, 2, batch_first=True)
        self.mu = nn.Linear(size, 1)
        self.sigma = nn.Linear(size, 1)

    def forward(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and spread of the next value at each step."""
        states = self.rnn(past[..., None])[0]
        return self.mu(states)[..., 0], F.softplus(self.sigma(states))[..., 0] + 1e-3


def days(g: Generator) -> tuple[Tensor, Tensor]:
    """Small waves with a period of eight; the target is the series one step later."""
    time = torch.arange(33) + 8 * uniform(g, 16, 1)
    y = 0.3 * torch.sin(time * 6.283 / 8) + 0.02 * normal(g, 16, 33)
    return y[:, :-1], y[:, 1:]


@healthy(
    "contact11a-deepar-negative",
    below_zero(0.5, steps=60),
    source="https://github.com/awslabs/gluonts/issues/687",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def deepar_negative(width: int) -> Setup:
    """A probabilistic forecaster whose loss goes below zero and keeps falling: it is minus the logarithm of a
    density, which is above one where the spread is small."""

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return -torch.distributions.Normal(*output).log_prob(target).mean()

    return setup(GaussianDeepAR(width), days, loss, 5e-3)


class FeatureTransformer(nn.Module):
    """A gated linear layer with a batch norm."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(size, 2 * out, bias=False)
        self.bn = nn.BatchNorm1d(2 * out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated features."""
        return F.glu(self.bn(self.fc(x)))


class TabNet(nn.Module):
    """Steps of attention to the columns of a table, after a batch norm of the raw columns."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.initial_bn = nn.BatchNorm1d(8)
        self.initial_splitter = FeatureTransformer(8, size)
        self.att_transformers = nn.ModuleList([nn.Linear(size, 8) for _ in range(2)])
        self.feat_transformers = nn.ModuleList([FeatureTransformer(8, size) for _ in range(2)])
        self.final_mapping = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes."""
        x = self.initial_bn(x)
        att, prior, result = self.initial_splitter(x), torch.ones_like(x), 0.0
        for attend, transform in zip(self.att_transformers, self.feat_transformers, strict=True):
            mask = (attend(att) * prior).softmax(-1)
            prior = prior * (1.3 - mask)
            att = transform(mask * x)
            result = result + F.relu(att)
        return self.final_mapping(result)


def census(g: Generator) -> tuple[Tensor, Tensor]:
    """Raw columns from shares of one to weights of a hundred thousand; the class is told by three."""
    plain = normal(g, 64, 8)
    scale = torch.tensor([13.0, 1e5, 2.5, 7e3, 400.0, 12.0, 0.4, 0.1])
    kind = (plain[:, 0] + plain[:, 3] - plain[:, 6] > 0).long()
    return plain * scale + 2 * scale, kind


@healthy(
    "contact11a-tabnet-raw",
    wide("initial_bn", 1e4),
    source="https://github.com/dreamquark-ai/tabnet/issues/356",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tabnet_raw(width: int) -> Setup:
    """A network for tables that is fed the raw columns, whose spreads differ by a factor of a million: its
    first layer is a batch norm, and nothing else is needed."""
    return setup(TabNet(width), census, F.cross_entropy, 1e-2)


class Retrieval(nn.Module):
    """Towers of queries and candidates; the in-batch scores are divided by a small temperature."""

    def __init__(self, size: int, temperature: float) -> None:
        super().__init__()
        self.query_model = nn.Sequential(nn.Embedding(60, size), nn.Linear(size, size))
        self.candidate_model = nn.Sequential(nn.Embedding(60, size), nn.Linear(size, size))
        self.scores = nn.Identity()
        self.temperature = temperature

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the scores of all candidates of the batch for each query."""
        query = F.normalize(self.query_model(user), dim=1)
        candidate = F.normalize(self.candidate_model(item), dim=1)
        return self.scores(query @ candidate.t() / self.temperature)


def views(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Users, all different, and the item that each looked at."""
    taste = torch.randperm(60, generator=seeded(63))
    user = torch.randperm(60, generator=g)[:32]
    return (user, taste[user]), torch.arange(32)


@healthy(
    "contact11a-retrieval-temperature",
    huge("*", 15.0),
    source="https://github.com/tensorflow/recommenders/issues/633",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def retrieval_temperature(width: int) -> Setup:
    """A two-tower retrieval model with the small temperature of the papers: the scores are cosines divided by
    0.02, so that the first loss is five times that of chance and the gradients are large; it trains all the
    same."""
    return setup(Retrieval(width, 0.02), views, F.cross_entropy, 5e-3)
