"""Graphs, speech and forecasting, after public reports of training trouble."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import alike, no_gradient, not_finite, strong
from .data import Sample, adam, choice, normal, seeded, setup, token_loss, uniform
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------------------------------ a speech front end


class Subsampling(nn.Module):
    """Two strided convolutions over time and frequency and a linear layer, then positions are added."""

    def __init__(self, bins: int, dim: int, *, through: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.out = nn.Linear(8 * (bins // 4), dim)
        steps = torch.arange(64)[:, None] * torch.exp(-torch.arange(0, dim, 2) * math.log(1e4) / dim)
        self.register_buffer("pe", torch.cat([steps.sin(), steps.cos()], -1))
        self.through = through

    def forward(self, mel: Tensor) -> Tensor:
        """Return a quarter as many frames of the model's size."""
        x = self.conv(mel[:, None])
        x = self.out(x.transpose(1, 2).flatten(2))
        with torch.set_grad_enabled(self.through and torch.is_grad_enabled()):
            return math.sqrt(x.shape[-1]) * x + self.pe[: x.shape[1]]


class Recogniser(nn.Module):
    """A transformer encoder over subsampled speech with a label for every frame."""

    def __init__(self, bins: int, dim: int, labels: int, *, through: bool) -> None:
        super().__init__()
        self.embed = Subsampling(bins, dim, through=through)
        layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.encoders = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.after_norm, self.ctc_lo = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, mel: Tensor) -> Tensor:
        """Return the logits of every frame's label."""
        return self.ctc_lo(self.after_norm(self.encoders(self.embed(mel))))


def _speech(bins: int, labels: int) -> Sample:
    tones = normal(seeded(31), labels, bins)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        text = choice(g, labels, 8, 8)
        sound = tones[text].repeat_interleave(4, 1)
        return sound + 0.8 * normal(g, *sound.shape), text

    return sample


@sick(
    "contact12b-asr-frontend",
    [("DEAD", "embed")],
    no_gradient("embed"),
    source="https://github.com/espnet/espnet/pull/465",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def front_end(sick: bool, width: int) -> Setup:
    """The positions are added without recording gradients, as if they were a constant, and all that comes
    before them, convolutions and input layer, stays random. Repair: record that addition too."""
    model = Recogniser(16, width, 10, through=not sick)
    return setup(model, _speech(16, 10), token_loss, adam(2e-3))


# ----------------------------------------------------------------------------------- weather on a graph


class Interaction(nn.Module):
    """An interaction network layer on a ring of grid points."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.edge_mlp = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.aggr_mlp = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the nodes after messages from both neighbours."""
        sides = [self.edge_mlp(torch.cat([x, x.roll(s, 1)], -1)) for s in (1, -1)]
        return x + self.aggr_mlp(torch.cat([x, sides[0] + sides[1]], -1))


class GridForecaster(nn.Module):
    """An autoregressive graph model of humidity and temperature, whose humidity stays between 0 and 1."""

    def __init__(self, dim: int, steps: int, *, smooth: bool) -> None:
        super().__init__()
        self.grid_embedder = nn.Linear(2, dim)
        self.processor = nn.ModuleList(Interaction(dim) for _ in range(2))
        self.output_map = nn.Linear(dim, 2)
        nn.init.normal_(self.output_map.weight, std=0.02)
        self.steps, self.smooth = steps, smooth

    def limit(self, humidity: Tensor, delta: Tensor) -> Tensor:
        """Return the next humidity, held between 0 and 1."""
        if self.smooth:
            return torch.sigmoid(torch.log(humidity / (1 - humidity)) + delta)
        return torch.clamp(humidity + delta, 0.0, 1.0)

    def forward(self, state: Tensor) -> Tensor:
        """Return the forecasts of all steps."""
        forecasts = []
        for _ in range(self.steps):
            x = self.grid_embedder(state)
            for layer in self.processor:
                x = layer(x)
            delta = self.output_map(x)
            humidity = self.limit(state[..., :1], delta[..., :1])
            state = torch.cat([humidity, state[..., 1:] + delta[..., 1:]], -1)
            forecasts.append(state)
        return torch.stack(forecasts, 1)


def _weather(g: Generator) -> tuple[Tensor, Tensor]:
    phase = 6.3 * uniform(g, 16, 1) + torch.arange(24) * (6.3 / 24)
    warm = torch.cos(phase - 1)

    def at(t: int) -> Tensor:
        humidity = (0.5 + 0.7 * torch.sin(phase + 0.5 * t)).clamp(0, 1)
        return torch.stack([humidity, warm + 0.4 * t * torch.sin(phase)], -1)

    return at(0), torch.stack([at(1), at(2)], 1)


@sick(
    "contact12b-lam-limits",
    [("NUMERICAL", "*")],
    not_finite(3),
    source="https://github.com/mllam/neural-lam/issues/119",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def limits(sick: bool, width: int) -> Setup:
    """Humidity is held in its limits by a sigmoid of its inverse sigmoid; where the air is saturated it is 1,
    the inverse is infinite, and in the second step of the rollout zero times infinity. Repair: clamp."""
    return setup(GridForecaster(width, 2, smooth=sick), _weather, F.mse_loss, adam(2e-3))


# ------------------------------------------------------------------------- a set transformer on graphs


class SetAttention(nn.Module):
    """A set attention block on padded graphs; what belongs to no node is dropped again."""

    def __init__(self, dim: int, heads: int, *, after: bool) -> None:
        super().__init__()
        self.heads, self.after = heads, after
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj_o, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the nodes after attention within their graph."""
        batch, size, dim = x.shape
        shape = (batch, size, self.heads, dim // self.heads)
        q, k, v = (p(x).view(shape) for p in (self.proj_q, self.proj_k, self.proj_v))
        e = torch.einsum("bxhd,byhd->bhxy", q, k) / math.sqrt(shape[-1])
        pair = ~(mask[:, :, None] & mask[:, None, :])[:, None]
        alpha = e.masked_fill(pair, -math.inf).softmax(-1)
        if self.after:
            alpha = alpha.masked_fill(pair, 0.0)
        out = self.proj_o(torch.einsum("bhxy,byhd->bxhd", alpha, v).reshape(batch, size, dim))
        real = self.norm(x[mask] + out[mask])
        return torch.zeros_like(x).index_put((mask,), real)


class SetTransformer(nn.Module):
    """Set attention blocks, a mean over the nodes of each graph, and a classifier."""

    def __init__(self, features: int, dim: int, *, after: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(features, dim)
        self.layers = nn.ModuleList(SetAttention(dim, 2, after=after) for _ in range(2))
        self.classify = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of each graph's class."""
        x = self.embed(x) * mask[..., None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.classify(x.sum(1) / mask.sum(1, keepdim=True))


def _graphs(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    kind = choice(g, 3, 24)
    mask = torch.arange(9)[None] < (4 + choice(g, 6, 24))[:, None]
    x = normal(g, 24, 9, 6) + 1.5 * F.one_hot(kind, 6)[:, None]
    return (x * mask[..., None], mask), kind


@sick(
    "contact12b-set-padding",
    [("NUMERICAL", "*")],
    not_finite(3),
    source="https://github.com/dmlc/dgl/issues/2657",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def padding(sick: bool, width: int) -> Setup:
    """Graphs are padded to one size, and a row of padding has all scores at minus infinity: its softmax is
    NaN, and though it is dropped, the values' gradient is not. Repair: zero those weights afterwards."""
    return setup(SetTransformer(6, width, after=not sick), _graphs, F.cross_entropy, adam(2e-3))


# -------------------------------------------------------------------------------- graphs without features


class GraphConv(nn.Module):
    """A graph convolution that divides by the degree, or by its root on both sides."""

    def __init__(self, size: int, dim: int, norm: str) -> None:
        super().__init__()
        self.norm, self.weight = norm, nn.Linear(size, dim)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        """Return the aggregated and transformed node features."""
        degree = adjacency.sum(1, keepdim=True).clamp_min(1)
        mixed = (
            adjacency @ x / degree
            if self.norm == "right"
            else adjacency @ (x / degree.sqrt()) / degree.sqrt()
        )
        return self.weight(mixed)


class BotNet(nn.Module):
    """Three graph convolutions that tell bots from others by the shape of the network alone."""

    def __init__(self, dim: int, norm: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GraphConv(1 if i == 0 else dim, dim, norm) for i in range(3))
        self.final = nn.Linear(dim, 2)

    def forward(self, adjacency: Tensor) -> Tensor:
        """Return every node's logits."""
        x = torch.ones(len(adjacency), 1)
        for layer in self.layers:
            x = F.relu(layer(adjacency, x))
        return self.final(x)


def _network(g: Generator) -> tuple[Tensor, Tensor]:
    bot = uniform(g, 60) < 0.5
    pull = torch.where(bot, 0.5, 0.08)
    chance = (1.2 * pull[:, None] * pull[None]).clamp_min(0.03)
    edges = (uniform(g, 60, 60) < chance).float()
    edges = torch.triu(edges, 1)
    return edges + edges.T + torch.eye(60), bot.long()


@sick(
    "contact12b-botnet-norm",
    [("BOTTLENECK", "*")],
    alike("final", 1e-4),
    allow=["DEAD"],
    source="https://github.com/dmlc/dgl/issues/3050",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def botnet(sick: bool, width: int) -> Setup:
    """All nodes have the feature 1, and a mean over neighbours (norm='right') of equal features is the same
    at every node, in every layer: nothing tells nodes apart. Repair: norm='both', which keeps degrees."""
    return setup(BotNet(width, "right" if sick else "both"), _network, F.cross_entropy, adam(5e-3))


# ----------------------------------------------------------------------------------- probabilistic RNNs


class DeepAR(nn.Module):
    """An LSTM over scaled past values that gives a distribution's two parameters for the horizon."""

    def __init__(self, width: int, horizon: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, width, batch_first=True)
        self.projector = nn.Linear(width, 2 * horizon)

    def forward(self, past: Tensor) -> Tensor:
        """Return the raw parameters, (batch, horizon, 2)."""
        return self.projector(self.rnn(past[..., None])[0][:, -1]).unflatten(-1, (-1, 2))


def _demand(*, own: bool) -> Sample:
    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        level = 1 + 3 * uniform(g, 32, 1)
        series = level * (1 + 0.3 * torch.sin(torch.arange(16) / 2)) + 0.2 * normal(g, 32, 16)
        quiet = uniform(g, 32, 1) < 0.25
        series = torch.where(quiet & (torch.arange(16) < 12), torch.zeros(()), series)
        past, future = series[:, :12], series[:, 12:]
        centre = past.mean(1, keepdim=True) if own else torch.tensor(2.0)
        scale = past.std(1, keepdim=True) + 1e-8 if own else torch.tensor(1.5)
        return (past - centre) / scale, (future - centre) / scale

    return sample


@sick(
    "contact12b-deepar-windows",
    [("EXPLODING", "*")],
    strong("*", 1e4),
    allow=["NUMERICAL", "UNSTABLE"],
    source="https://github.com/sktime/pytorch-forecasting/issues/750",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def windows(sick: bool, width: int) -> Setup:
    """Every window is scaled by the deviation of its own past; a past of zeros has none, and sales after it
    become 1e8 and more: the loss and its gradient are absurd. Repair: the scale of the group of series."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        mean, deviation = output[..., 0], F.softplus(output[..., 1]) + 1e-3
        return (0.5 * ((target - mean) / deviation).square() + deviation.log() + 1).mean()

    return setup(DeepAR(width, 4), _demand(own=sick), loss, adam(3e-3))


def _counts(g: Generator) -> tuple[tuple[Tensor], tuple[Tensor, Tensor]]:
    level = torch.exp(1.2 * normal(g, 32, 1) - 0.3)
    counts = torch.poisson(level * torch.tensor([0.02, 3.9, 0.06, 0.02]).repeat(4), generator=g)
    scale = counts[:, :12].mean(1, keepdim=True).clamp_min(0.08)
    return (counts[:, :12] / scale,), (counts[:, 12:], scale)


@sick(
    "contact12b-negbin-scale",
    [("NUMERICAL", "*")],
    not_finite(3),
    source="https://github.com/awslabs/gluonts/pull/814",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def counts(sick: bool, width: int) -> Setup:
    """The dispersion of the negative binomial is shifted by (scale - 1) / (scale mu), which for series that
    sell less than one a day makes it negative, and its logarithm NaN. Repair: a scale of at least one."""

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        y, scale = target
        scale = scale if sick else scale.clamp_min(1.0)
        mu = scale * F.softplus(output[..., 0])
        alpha = F.softplus(output[..., 1]) + (scale - 1) / mu
        r, amu = 1 / alpha, alpha * mu
        log_prob = y * (amu / (1 + amu)).log() - r * torch.log1p(amu)
        return -(log_prob + torch.lgamma(y + r) - torch.lgamma(y + 1) - torch.lgamma(r)).mean()

    return setup(DeepAR(width, 4), _counts, loss, adam(5e-3))
