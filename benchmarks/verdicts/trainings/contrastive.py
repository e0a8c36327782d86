"""Trainings of representations: pairs that belong together, and nets that learn from themselves."""

from __future__ import annotations

import copy

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .data import Figure, choice, frozen, moving_average, normal, parameters, seeded, table, training, uniform
from .registry import Training, healthy
from .tables import mlp


def views(g: Generator, number: int = 64) -> tuple[Tensor, Tensor]:
    """Return two views of the same digits: some pixels hidden, brighter or darker, with noise."""
    x = table("digits")[0]
    x = x[choice(g, len(x), number)] + 0.3

    def view() -> Tensor:
        seen = (uniform(g, *x.shape) > 0.2).float()
        return x * seen * (0.7 + 0.6 * uniform(g, number, 1)) + 0.05 * normal(g, *x.shape)

    return view(), view()


def partners(encode: nn.Module) -> Figure:
    """Return the figure: how often the nearest of 128 second views is one of the same picture."""

    def figure(_: nn.Module) -> float:
        one, two = (F.normalize(encode(view), dim=1) for view in views(seeded(98), 128))
        return float(((one @ two.T).argmax(1) == torch.arange(128)).float().mean())

    return figure


def neighbours(encode: nn.Module) -> Figure:
    """Return the figure: how often the nearest known digit is of the same kind, by the margin between the
    nearest of its own kind and the nearest of another."""
    x, y, xt, yt = table("digits")

    def figure(_: nn.Module) -> float:
        near = -torch.cdist(encode(xt + 0.3), encode(x + 0.3))
        own = y == yt[:, None]
        apart = near.masked_fill(own, -1e9).amax(1) / near.masked_fill(~own, -1e9).amax(1)
        return float((apart > 1.5).float().mean())

    return figure


class Pair(nn.Module):
    """One encoder and one projection for both views."""

    def __init__(self, size: int, batch_norm: bool = False) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(size)] if batch_norm else []
        self.encoder = nn.Sequential(nn.Linear(64, size), *norm, nn.ReLU(), nn.Linear(size, size))
        self.project = nn.Sequential(nn.ReLU(), nn.Linear(size, 32))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two projections."""
        one, two = self.project(self.encoder(torch.cat([a, b]))).chunk(2)
        return one, two


def both(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
    """Return two views, and no target."""
    return views(g), None


@healthy("pairs-simclr", 1000, at_least=0.5, source="https://arxiv.org/abs/2002.05709")
def simclr() -> Training:
    """Contrast of two views against all others of the batch."""
    model = Pair(64)

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        z = F.normalize(torch.cat(output), dim=1)
        near = (z @ z.T / 0.2).fill_diagonal_(-1e9)
        half = len(z) // 2
        return F.cross_entropy(near, torch.arange(2 * half).roll(half))

    return training(model, both, loss, 2e-3, partners(model.encoder))


@healthy("pairs-vicreg", 1000, at_least=0.35, source="https://arxiv.org/abs/2105.04906")
def vicreg() -> Training:
    """Views drawn together, features held apart by their variance and covariance."""
    model = Pair(64, batch_norm=True)

    def held(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        shared = z.T @ z / (len(z) - 1)
        apart = shared.square().sum() - shared.diagonal().square().sum()
        return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() + 0.04 * apart / z.shape[1]

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        one, two = output
        return F.mse_loss(one, two) + held(one) + held(two)

    return training(model, both, loss, 2e-3, partners(model.encoder))


class Siamese(nn.Module):
    """Two views, each predicting the other's projection, which gets no gradient."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Linear(size, 32), nn.BatchNorm1d(32)
        )
        self.predict = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 32))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return both predictions and both projections."""
        one, two = self.encoder(a), self.encoder(b)
        return self.predict(one), self.predict(two), one.detach(), two.detach()


@healthy("pairs-simsiam-stopped", 1500, at_least=0.5, source="https://arxiv.org/abs/2011.10566")
def simsiam() -> Training:
    """Two views that predict each other; the predicted side gets no gradient."""
    model = Siamese(96)

    def loss(output: tuple[Tensor, ...], target: None) -> Tensor:
        p1, p2, z1, z2 = output
        return -0.5 * (F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    return training(model, both, loss, optimizer, partners(model.encoder))


@healthy("pairs-byol-moving-target", 1000, at_least=0.5, source="https://arxiv.org/abs/2006.07733")
def byol() -> Training:
    """The target is a moving average of the net itself."""
    encoder = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 32))
    model = nn.Sequential(encoder, nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)))
    target_net = frozen(copy.deepcopy(encoder))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        a, b = views(g)
        with torch.no_grad():
            return torch.cat([a, b]), torch.cat([target_net(b), target_net(a)])

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 2 - 2 * F.cosine_similarity(output, target).mean()

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    after = moving_average(target_net, encoder, 0.98)
    return training(model, sample, loss, optimizer, partners(encoder), after=after)


class Two(nn.Module):
    """An encoder for each kind of thing, and a temperature that is learned."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.picture, self.word = (
            mlp(64, size, size),
            nn.Sequential(nn.Embedding(10, size), nn.Linear(size, size)),
        )
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Return how well each picture goes with each word."""
        one, two = F.normalize(self.picture(x), dim=1), F.normalize(self.word(words), dim=1)
        return self.scale.exp() * one @ two.T


@healthy("pairs-clip-pictures-and-names", 500, at_least=0.85)
def clip() -> Training:
    """Digits and their names, both encoded, drawn together within a batch of ten different ones."""
    x, y, xt, yt = table("digits")
    of_kind = [x[y == kind] for kind in range(10)]

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
        order = torch.randperm(10, generator=g)
        one = [of_kind[k][choice(g, len(of_kind[k]), 1)] for k in order.tolist()]
        return (torch.cat(one), order), None

    def loss(output: Tensor, target: None) -> Tensor:
        own = torch.arange(len(output))
        return 0.5 * (F.cross_entropy(output, own) + F.cross_entropy(output.T, own))

    def right(net: nn.Module) -> float:
        return float((net(xt, torch.arange(10)).argmax(1) == yt).float().mean())

    return training(Two(32), sample, loss, 3e-3, right)


@healthy("pairs-triplet-margin", 500, at_least=0.8)
def triplet() -> Training:
    """An anchor, one of its kind, one of another, with a margin: most triplets soon cost nothing."""
    x, y, *_ = table("digits")
    of_kind = [x[y == kind] + 0.3 for kind in range(10)]
    model = mlp(64, 64, 16)

    def sample(g: Generator) -> tuple[Tensor, None]:
        kinds = choice(g, 10, 32)
        others = (kinds + 1 + choice(g, 9, 32)) % 10
        chosen = [
            [of_kind[k][choice(g, len(of_kind[k]), 1)] for k in part.tolist()]
            for part in (kinds, kinds, others)
        ]
        return torch.cat([torch.cat(part) for part in chosen]), None

    def loss(output: Tensor, target: None) -> Tensor:
        return F.triplet_margin_loss(*output.chunk(3), margin=0.5)

    return training(model, sample, loss, 1e-3, neighbours(model))


class Angular(nn.Module):
    """Directions of classes on a sphere; the output is cosines."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.body, self.centres = mlp(64, 64, size), nn.Parameter(torch.randn(10, size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the cosines to every class."""
        return F.normalize(self.body(x), dim=1) @ F.normalize(self.centres, dim=1).T


@healthy("pairs-angular-margin", 500, at_least=0.92, source="https://arxiv.org/abs/1801.07698")
def angular() -> Training:
    """Classes told by angles, with a margin and a scale of sixteen."""
    x, y, xt, yt = table("digits")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        chosen = choice(g, len(x), 32)
        return x[chosen], y[chosen]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        own = F.one_hot(target, 10).bool()
        angle = torch.acos(output.clamp(-1 + 1e-6, 1 - 1e-6))
        return F.cross_entropy(16 * torch.where(own, torch.cos(angle + 0.3), output), target)

    def right(net: nn.Module) -> float:
        return float((net(xt).argmax(1) == yt).float().mean())

    return training(Angular(16), sample, loss, 2e-3, right)


class Words(nn.Module):
    """Two tables of vectors; a pair's logit is their product."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.centre, self.context = nn.Embedding(words, size), nn.Embedding(words, size)
        nn.init.uniform_(self.centre.weight, -0.5 / size, 0.5 / size)
        nn.init.zeros_(self.context.weight)

    def forward(self, centre: Tensor, context: Tensor) -> Tensor:
        """Return logits (batch, contexts)."""
        return torch.einsum("bd,bkd->bk", self.centre(centre), self.context(context))


@healthy("pairs-word-vectors-negative-sampling", 700, at_most=0.5)
def word_vectors() -> Training:
    """Word vectors with four false neighbours for each true one; one table starts at zero, as published."""
    words, topics = 60, choice(seeded(51), 6, 60)
    of_topic = [torch.nonzero(topics == t)[:, 0] for t in range(6)]

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        centre = choice(g, words, 128)
        true = torch.cat([of_topic[t][choice(g, len(of_topic[t]), 1)] for t in topics[centre].tolist()])
        context = torch.cat([true[:, None], choice(g, words, 128, 4)], 1)
        return (centre, context), torch.tensor([1.0, 0, 0, 0, 0]).expand(128, 5)

    loss = F.binary_cross_entropy_with_logits
    model = Words(words, 16)

    def figure(net: nn.Module) -> float:
        inputs, target = sample(seeded(98))
        return float(loss(net(*inputs), target))

    return training(model, sample, loss, torch.optim.Adam(parameters(model), lr=1e-2), figure)
