"""Small flows, autoencoders, contrastive embeddings, differential equations and graphs after public
reports."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .claims import alike, huge, not_finite, rises
from .data import choice, clusters, normal, seeded, setup, sgd, stack, uniform
from .registry import FLOAT32, Setup, sick


class _Coupling(nn.Module):
    """Every other feature scales and shifts those between; which ones do alternates."""

    def __init__(self, size: int, width: int, odd: bool, bounded: bool) -> None:
        super().__init__()
        self.scale, self.shift = (
            stack(
                a=nn.Linear(size // 2, width),
                act1=nn.LeakyReLU(0.2),
                b=nn.Linear(width, width),
                act2=nn.LeakyReLU(0.2),
                c=nn.Linear(width, size // 2),
            )
            for _ in range(2)
        )
        self.odd, self.bounded = odd, bounded

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, rest = (x[:, 1::2], x[:, ::2]) if self.odd else (x[:, ::2], x[:, 1::2])
        scale = self.scale(kept)
        scale = torch.tanh(scale) if self.bounded else scale
        rest = rest * scale.exp() + self.shift(kept)
        pair = (rest, kept) if self.odd else (kept, rest)
        return torch.stack(pair, 2).flatten(1), scale.sum(1)


class _Flow(nn.Module):
    def __init__(self, size: int, width: int, bounded: bool, depth: int = 9) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(_Coupling(size, width, bool(i % 2), bounded) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0])
        for coupling in self.couplings:
            x, change = coupling(x)
            total = total + change
        return 0.5 * x.square().sum(1) + 0.5 * x.shape[1] * math.log(2 * math.pi) - total


def _records(g: torch.Generator) -> tuple[Tensor, None]:
    middle = uniform(seeded(31), 100)
    return 10 * (middle + 0.5 * normal(g, 64, 100)).abs(), None


@sick(
    "contact13b-flow-dimensions",
    [("NUMERICAL", "couplings")],
    not_finite(20),
    allow=("EXPLODING", "UNSTABLE"),
    source="https://github.com/karpathy/pytorch-normalizing-flows/issues/3",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def flow_dimensions(sick: bool, width: int) -> Setup:
    """A flow that was made for two dimensions is given data of a hundred, unscaled: each coupling multiplies
    by the exponential of a score that grows with its input, so that features explode from one coupling to the
    next and the loss is NaN at once. Repair: scores between bounds."""
    return setup(_Flow(100, width, not sick), _records, lambda nll, _: nll.mean(), 1e-3)


class _Autoencoder(nn.Module):
    """A variational autoencoder of pictures of shapes on a plain background."""

    def __init__(self, width: int, pixels: int = 64) -> None:
        super().__init__()
        self.encoder = stack(first=nn.Linear(pixels, width), act=nn.ReLU())
        self.mean = nn.Linear(width, 8)
        self.logvar = nn.Linear(width, 8)
        self.decoder = stack(first=nn.Linear(8, width), act=nn.ReLU(), out=nn.Linear(width, pixels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return self.decoder(z).sigmoid(), mean, logvar


def _shapes(scale: float):
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        centre = 1 + 6 * uniform(g, 32, 2, 1, 1)
        mask = ((rows - centre[:, 0]).abs() < 1) & ((columns - centre[:, 1]).abs() < 1)
        x = (scale * mask.float()).flatten(1)
        return x, x

    return sample


def _elbo(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    made, mean, logvar = output
    told = x * torch.log(made + 1e-8) + (1 - x) * torch.log(1 - made + 1e-8)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
    return (kl - told.sum(1)).mean()


@sick(
    "contact13b-vae-pixels",
    [("EXPLODING", "*")],
    huge("logvar", 1e3),
    allow=("NUMERICAL", "UNSTABLE", "SATURATION"),
    source="https://github.com/wohlert/semi-supervised-pytorch/issues/9",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def vae_pixels(sick: bool, width: int) -> Setup:
    """The pixels run from 0 to 255, as inputs and as targets of a cross entropy that wants 0 to 1: means and
    log variances are large, and their exponential blows the loss and its gradients up beyond all measure.
    Repair: pixels from 0 to 1."""
    return setup(_Autoencoder(width), _shapes(255.0 if sick else 1.0), _elbo)


def _views(kinds: int = 8, size: int = 16, number: int = 24):
    centres = normal(seeded(32), kinds, size)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, kinds, number)
        x = centres[kind][:, None] + 0.5 * normal(g, number, 2, size)
        return x.flatten(0, 1), kind.repeat_interleave(2)

    return sample


def _supervised(temperature: float):
    """Return the loss that draws rows of the same class together, against all other rows."""

    def loss(rows: Tensor, kind: Tensor) -> Tensor:
        scores = rows @ rows.T / temperature
        scores = scores - scores.amax(1, keepdim=True).detach()
        others = 1 - torch.eye(len(rows))
        same = (kind[:, None] == kind).float() * others
        told = scores - torch.log((scores.exp() * others).sum(1, keepdim=True))
        return -((same * told).sum(1) / same.sum(1)).mean()

    return loss


class _Projector(nn.Module):
    def __init__(self, width: int, unit: bool) -> None:
        super().__init__()
        self.encoder = stack(first=nn.Linear(16, width), act=nn.ReLU(), second=nn.Linear(width, width))
        self.head = stack(act=nn.ReLU(), out=nn.Linear(width, 128, bias=False), norm=nn.BatchNorm1d(128))
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.encoder(x))
        return F.normalize(out, dim=1) if self.unit else out


@sick(
    "contact13b-contrastive-bare",
    [("NUMERICAL", "*")],
    not_finite(20),
    allow=("EXPLODING", "SATURATION", "UNSTABLE"),
    source="https://github.com/HobbitLong/SupContrast/issues/100",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def contrastive_bare(sick: bool, width: int) -> Setup:
    """The rows, of 128 features of unit variance, are not brought to unit length: a row's product with itself
    is far above all others, and once that maximum is taken off, the other exponentials are all zero and the
    logarithm of their sum is minus infinity. Repair: rows of unit length."""
    return setup(_Projector(width, not sick), _views(), _supervised(0.07), 1e-3)


@sick(
    "contact13b-embedding-coincide",
    [("NUMERICAL", "*")],
    not_finite(20, loss=False),
    source="https://github.com/huggingface/sentence-transformers/pull/4033",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def embedding_coincide(sick: bool, width: int) -> Setup:
    """Some anchors and their positives are one and the same sentence, with a distance of exactly zero; the
    square root of the sum of squares has no finite slope there: NaN gradients, though the loss is fine.
    Repair: the vector norm, whose slope at zero is zero."""
    model = stack(
        words=nn.EmbeddingBag(40, width, mode="mean"),
        lin=nn.Linear(width, width),
        act=nn.Tanh(),
        out=nn.Linear(width, width),
    )

    def sample(g: torch.Generator) -> tuple[Tensor, None]:
        kind = choice(g, 4, 16)
        other = (kind + 1 + choice(g, 3, 16)) % 4
        anchor = 10 * kind[:, None] + choice(g, 10, 16, 5)
        positive = 10 * kind[:, None] + choice(g, 10, 16, 5)
        positive[:2] = anchor[:2]  # duplicates in the data
        negative = 10 * other[:, None] + choice(g, 10, 16, 5)
        return torch.cat([anchor, positive, negative]), None

    def far(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum(1).sqrt() if sick else torch.linalg.vector_norm(a - b, dim=1)

    def loss(rows: Tensor, _: None) -> Tensor:
        anchor, positive, negative = rows.chunk(3)
        return (far(anchor, positive) - far(anchor, negative) + 1).relu().mean()

    return setup(model, sample, loss)


class _Latent(nn.Module):
    """Reads a spiral backwards into a latent state, integrates that in time, and decodes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reader = nn.GRU(2, width, batch_first=True)
        self.start = nn.Linear(width, 4)
        self.field = stack(
            a=nn.Linear(4, width),
            act1=nn.ELU(),
            b=nn.Linear(width, width),
            act2=nn.ELU(),
            c=nn.Linear(width, 4),
        )
        self.decoder = stack(a=nn.Linear(4, width), act=nn.ReLU(), b=nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.reader(x.flip(1))
        z, states = self.start(state[0]), []
        for _ in range(x.shape[1]):
            states.append(z)
            z = z + 0.2 * self.field(z)
        return self.decoder(torch.stack(states, 1))


def _spirals(g: torch.Generator) -> tuple[Tensor, Tensor]:
    t = torch.linspace(0, 6, 30)
    phase, grow = 6.3 * uniform(g, 16, 1), 0.3 + 0.4 * uniform(g, 16, 1)
    x = torch.stack([(1 + grow * t) * torch.cos(t + phase), (1 + grow * t) * torch.sin(t + phase)], -1)
    return x + 0.1 * normal(g, *x.shape), x


@sick(
    "contact13b-latent-dynamics",
    [("UNSTABLE", "*")],
    rises(100.0),
    allow=("NUMERICAL", "EXPLODING"),
    source="https://github.com/rtqichen/torchdiffeq/issues/58",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def latent_dynamics(sick: bool, width: int) -> Setup:
    """Adam at a rate of 0.01 was replaced by gradient descent with momentum at the same rate, under a
    likelihood that is summed over time with a small noise, in the tens of thousands: after the first step the
    dynamics run away. Repair: Adam."""

    def loss(made: Tensor, x: Tensor) -> Tensor:
        return (0.5 * ((made - x) / 0.3).square()).sum((1, 2)).mean()

    return setup(_Latent(width), _spirals, loss, sgd(0.01, 0.9) if sick else 1e-2)


class _Messages(nn.Module):
    """Mean aggregation of messages on a graph where all are neighbours of all, then a class per node."""

    def __init__(self, width: int, own: bool, layers: int = 3) -> None:
        super().__init__()
        self.lift = nn.Linear(8, width)
        self.message = nn.ModuleList(
            stack(a=nn.Linear(width, width), act=nn.ReLU(), b=nn.Linear(width, width)) for _ in range(layers)
        )
        self.root = nn.ModuleList(nn.Linear(width, width) for _ in range(layers)) if own else None
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for number, message in enumerate(self.message):
            mean = message(x).mean(1, keepdim=True).expand_as(x)
            x = mean.relu() if self.root is None else (mean + self.root[number](x)).relu()
        return self.head(x)


@sick(
    "contact13b-graph-complete",
    [("BOTTLENECK", "*")],
    alike("head", 1e-4, dim=1),
    source="https://github.com/pyg-team/pytorch_geometric/issues/305",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def graph_complete(sick: bool, width: int) -> Setup:
    """On a complete graph with self-loops the mean over the neighbours is the same for every node, so that
    all nodes share one vector after the first layer and cannot be told apart. Repair: each node's own
    features beside the mean."""
    points = clusters(8, 4, 8 * 12)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, kind = points(g)
        return x.view(8, 12, 8), kind.view(8, 12)

    return setup(
        _Messages(width, not sick),
        sample,
        lambda out, kind: F.cross_entropy(out.flatten(0, 1), kind.flatten()),
    )
