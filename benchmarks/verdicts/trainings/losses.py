"""Trainings on losses of their own: quantiles, survival, orders, counts, several tasks, mixtures, ranks."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .data import explained, mean_loss, normal, rows, seeded, table, training, uniform
from .registry import Training, healthy
from .tables import mlp


@healthy("loss-quantiles-pinball", 700, at_most=0.06)
def quantiles() -> Training:
    """Three quantiles of noise that grows with the input, by the pinball loss."""
    parts = torch.tensor([0.1, 0.5, 0.9])

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 2 * uniform(g, 128, 1) - 1
        return x, torch.sin(3 * x) + (0.1 + 0.4 * x.abs()) * normal(g, 128, 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        apart = target - output
        return torch.maximum(parts * apart, (parts - 1) * apart).mean()

    _x, _y = sample(seeded(98))
    many = [sample(seeded(100 + i)) for i in range(10)]

    def off(net: nn.Module) -> float:
        below = torch.cat([(y <= net(x)).float() for x, y in many]).mean(0)
        return float((below - parts).abs().max())

    return training(mlp(1, 32, 32, 3, act=nn.Tanh), sample, loss, 3e-3, off)


@healthy("loss-survival-partial-likelihood", 500, at_least=0.75)
def survival() -> Training:
    """Risks told from who dies first among those still there, with censoring (Cox)."""
    w = normal(seeded(61), 8)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = normal(g, 64, 8)
        risk = torch.tanh(x @ w) + x[:, 0] * x[:, 1]
        time = -uniform(g, 64).clamp_min(1e-6).log() * torch.exp(-2 * risk)
        end = -uniform(g, 64).clamp_min(1e-6).log() * 2
        return x, (torch.minimum(time, end), (time <= end).float())

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        time, died = target
        order = time.argsort(descending=True)
        risk, died = output[order, 0], died[order]
        return -((risk - torch.logcumsumexp(risk, 0)) * died).sum() / died.sum()

    x, (time, died) = sample(seeded(98))

    def concordance(net: nn.Module) -> float:
        risk = net(x)[:, 0]
        pairs = (time[:, None] < time) & (died[:, None] > 0)
        return float((risk[:, None] > risk)[pairs].float().mean())

    return training(mlp(8, 48, 48, 1, act=nn.SiLU), sample, loss, 3e-3, concordance)


class Ordered(nn.Module):
    """One score, and thresholds that it is held against."""

    def __init__(self, inputs: int, grades: int) -> None:
        super().__init__()
        self.score = mlp(inputs, 24, 24, 1)
        self.thresholds = nn.Parameter(torch.linspace(1, -1, grades - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a logit for being above each grade."""
        return self.score(x) + self.thresholds


@healthy("loss-ordinal-grades", 900, at_least=0.75, source="https://arxiv.org/abs/1901.07884")
def ordinal() -> Training:
    """Grades from one to five, as being above each or not, with shared weights."""
    w = normal(seeded(62), 6)
    edges = torch.tensor([-1.2, -0.4, 0.4, 1.2])

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 6)
        return x, (((x @ w) / w.norm())[:, None] > edges).float()

    x, above = sample(seeded(98))

    def right(net: nn.Module) -> float:
        return float(((net(x) > 0).sum(1) == above.sum(1)).float().mean())

    return training(Ordered(6, 5), sample, F.binary_cross_entropy_with_logits, 3e-3, right)


class Tasks(nn.Module):
    """A trunk with a head for each task and learned weights of the tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU())
        self.kind, self.value, self.log_noise = (
            nn.Linear(24, 3),
            nn.Linear(24, 1),
            nn.Parameter(torch.zeros(2)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, a number, and the logs of the tasks' noise."""
        h = self.trunk(x)
        return self.kind(h), self.value(h), self.log_noise


@healthy("loss-two-tasks-weighed-by-noise", 600, at_least=0.85, source="https://arxiv.org/abs/1705.07115")
def tasks() -> Training:
    """The kind of a wine and its proline from the rest, each weighed by a noise that is learned."""
    x, y, xt, yt = table("wine")

    def split(inputs: Tensor, kind: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shown = inputs.clone()
        shown[:, 12] = 0
        return shown, (kind, inputs[:, 12:])

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return split(*rows(x, y)(g))

    def loss(output: tuple[Tensor, Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        kind, value, log_noise = output
        each = torch.stack([F.cross_entropy(kind, target[0]), F.mse_loss(value, target[1])])
        return (each * torch.exp(-log_noise) + 0.5 * log_noise).sum()

    def right(net: nn.Module) -> float:
        shown, (kind, value) = split(xt, yt)
        told = net(shown)
        part = 1 - F.mse_loss(told[1], value) / value.var()
        return float((told[0].argmax(1) == kind).float().mean() * (part > 0.3))

    model = Tasks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return training(model, sample, loss, optimizer, right)


@healthy("loss-mixture-density", 900, at_most=0.5)
def mixture_density() -> Training:
    """Several answers to one question: a mixture of normals whose parts the net tells."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        y = 2 * uniform(g, 128, 1) - 1
        return y + 0.6 * torch.sin(2 * math.pi * y) + 0.05 * normal(g, 128, 1), y

    def loss(output: Tensor, target: Tensor) -> Tensor:
        weight, mean, log_width = output.chunk(3, 1)
        each = -0.5 * ((target - mean) / log_width.exp()).square() - log_width - 0.919
        return -torch.logsumexp(weight.log_softmax(1) + each, 1).mean()

    model = mlp(1, 48, 48, 15, act=nn.Tanh)
    return training(model, sample, loss, 3e-3, mean_loss(sample, loss), clip=5.0)


@healthy("loss-normal-with-its-width", 800, at_most=0.0)
def normal_width() -> Training:
    """A mean and a width for every input, by the likelihood."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 4)
        return x, torch.sin(2 * x[:, :1]) + 0.3 * torch.exp(0.5 * x[:, 1:2]) * normal(g, 64, 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.gaussian_nll_loss(output[:, :1], target, F.softplus(output[:, 1:]) + 1e-4)

    model = mlp(4, 48, 48, 2)
    return training(model, sample, loss, 2e-3, mean_loss(sample, loss))


@healthy("loss-counts-poisson", 500, at_least=0.8)
def counts() -> Training:
    """Counts whose rates span two orders, by Poisson's likelihood of a log rate."""
    w = normal(seeded(63), 5) / 2

    def log_rate(x: Tensor) -> Tensor:
        return (1.5 + x @ w + 0.5 * torch.sin(2 * x[:, 0]))[:, None]

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 5)
        return x, torch.poisson(log_rate(x).exp(), generator=g)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.poisson_nll_loss(output, target)

    x = normal(seeded(98), 512, 5)
    return training(mlp(5, 32, 32, 1), sample, loss, 2e-3, explained(x, log_rate(x)))


@healthy("loss-lists-ranked", 500, at_least=0.8)
def ranked() -> Training:
    """Lists put into order: the softmax of scores against that of grades."""
    w = normal(seeded(64), 6)

    def grade(x: Tensor) -> Tensor:
        return 3 * torch.sigmoid(x @ w) + 0.5 * x[..., 0].abs()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 16, 10, 6)
        return x, grade(x) + 0.1 * normal(g, 16, 10)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output[..., 0], (2 * target).softmax(1))

    x = normal(seeded(98), 64, 10, 6)

    def first_right(net: nn.Module) -> float:
        return float((net(x)[..., 0].argmax(1) == grade(x).argmax(1)).float().mean())

    return training(mlp(6, 32, 1), sample, loss, 3e-3, first_right)


@healthy("loss-many-labels", 700, at_least=0.8)
def many_labels() -> Training:
    """Twelve labels at once, most of them rare, with weights for those that are there."""
    w = normal(seeded(65), 16, 12)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 16)
        return x, (x @ w / 4 > 1.2).float()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target, pos_weight=torch.full((12,), 4.0))

    x, y = (torch.cat(part) for part in zip(*(sample(seeded(900 + i)) for i in range(6)), strict=True))

    def f1(net: nn.Module) -> float:
        told = net(x) > 0
        return float(2 * (told & (y > 0)).sum() / (told.sum() + y.sum()))

    model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Hardswish(), nn.Linear(64, 12))
    return training(model, sample, loss, torch.optim.Adadelta(model.parameters(), lr=1.0), f1)
