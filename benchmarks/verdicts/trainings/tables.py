"""Trainings on tables: digits, iris, wine, breast cancer, diabetes, and synthetic ones."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .data import (
    accuracy,
    choice,
    cosine,
    explained,
    fitted,
    frozen,
    mean_loss,
    normal,
    parameters,
    rows,
    scheduled,
    seeded,
    table,
    training,
    uniform,
)
from .registry import Training, healthy


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


@healthy("table-digits-mlp", 600, at_least=0.93)
def digits_mlp() -> Training:
    """A plain rectified classifier of digits, with Adam."""
    x, y, xt, yt = table("digits")
    return training(mlp(64, 64, 64, 10), rows(x, y), F.cross_entropy, 1e-3, accuracy(xt, yt))


@healthy("table-iris-softmax-lbfgs", 40, at_least=0.9)
def iris_softmax() -> Training:
    """Softmax regression on all rows at once with L-BFGS."""
    x, y, xt, yt = table("iris")
    model = nn.Linear(4, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + 1e-3 * model.weight.square().sum()

    return training(model, lambda g: (x, y), loss, optimizer, accuracy(xt, yt))


@healthy("table-wine-tanh-momentum", 500, at_least=0.93)
def wine_tanh() -> Training:
    """A small tanh net on wine, with momentum."""
    x, y, xt, yt = table("wine")
    model = mlp(13, 24, 24, 3, act=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    return training(model, rows(x, y), F.cross_entropy, optimizer, accuracy(xt, yt))


@healthy("table-cancer-batchnorm-dropout", 500, at_least=0.93)
def cancer() -> Training:
    """Batch norm and dropout on breast cancer, one logit, with AdamW."""
    x, y, xt, yt = table("breast_cancer")
    block = [nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3)]
    model = nn.Sequential(nn.Linear(30, 32), *block, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

    def right(net: nn.Module) -> float:
        return float(((net(xt)[:, 0] > 0) == (yt > 0)).float().mean())

    sample = rows(x, y.float()[:, None], size=64)
    return training(model, sample, F.binary_cross_entropy_with_logits, optimizer, right)


@healthy("table-diabetes-huber-rmsprop", 600, at_least=0.35)
def diabetes() -> Training:
    """Regression on diabetes with Huber's loss and RMSprop."""
    x, y, xt, yt = table("diabetes")
    model = mlp(10, 32, 1, act=nn.ELU)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-4, weight_decay=1e-2)
    return training(model, rows(x, y), F.huber_loss, optimizer, explained(xt, yt))


@healthy("table-sines-adagrad", 1000, at_least=0.85)
def sines() -> Training:
    """Regression on a sum of sines with Adagrad and SiLU."""
    g0 = seeded(21)
    w = normal(g0, 6, 3) / 2

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 6)
        return x, torch.sin(x @ w).sum(1, keepdim=True)

    model = mlp(6, 64, 64, 1, act=nn.SiLU)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.03)
    return training(model, sample, F.mse_loss, optimizer, explained(*sample(seeded(98))))


class Columns(nn.Module):
    """Embeddings of categories and a few numbers, joined into one net."""

    def __init__(self, kinds: tuple[int, ...], numbers: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(kind, 8) for kind in kinds)
        self.net = mlp(8 * len(kinds) + numbers, 32, 1)

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """Return one logit, from integers (batch, tables) and numbers (batch, numbers)."""
        parts = [part(codes[:, i]) for i, part in enumerate(self.tables)]
        return self.net(torch.cat([*parts, numbers], 1))


@healthy("table-embedded-categories-onecycle", 1000, at_most=0.45)
def categories() -> Training:
    """Clicks told from categories, many of them rare, and numbers, with a one-cycle schedule."""
    g0, kinds = seeded(22), (50, 20, 7)
    effects = [normal(g0, kind) for kind in kinds]
    w = normal(g0, 4)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        codes = torch.stack([(kind * uniform(g, 64) ** 2).long() for kind in kinds], 1)
        x = normal(g, 64, 4)
        score = sum((e[codes[:, i]] for i, e in enumerate(effects)), x @ w)
        return (codes, x), (2 * score + 0.3 * normal(g, 64) > 0).float()[:, None]

    model = Columns(kinds, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = F.binary_cross_entropy_with_logits
    after = scheduled(optimizer, cosine(1000, warm=200))
    return training(model, sample, loss, optimizer, mean_loss(sample, loss), after=after)


class Factors(nn.Module):
    """Users and items as points; a rating is how well they agree."""

    def __init__(self, users: int, items: int, size: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, size, sparse=True), nn.Embedding(items, size, sparse=True)
        nn.init.normal_(self.user.weight, std=0.3)
        nn.init.normal_(self.item.weight, std=0.3)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the ratings of pairs."""
        return (self.user(users) * self.item(items)).sum(1)


@healthy("table-ratings-sparse-factors", 1200, at_most=0.15)
def ratings() -> Training:
    """Ratings as products of embeddings with sparse gradients, with SparseAdam."""
    g0 = seeded(23)
    truth = normal(g0, 60, 4) @ normal(g0, 4, 40) / 2

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        users, items = choice(g, 60, 128), choice(g, 40, 128)
        return (users, items), truth[users, items] + 0.1 * normal(g, 128)

    model = Factors(60, 40, 8)
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.02)
    return training(model, sample, F.mse_loss, optimizer, mean_loss(sample, F.mse_loss))


@healthy("table-digits-smoothed-labels-cosine", 800, at_least=0.93)
def smoothed() -> Training:
    """Smoothed labels, Nesterov's momentum, weight decay and half a cosine."""
    x, y, xt, yt = table("digits")
    model = mlp(64, 96, 10, act=nn.GELU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, label_smoothing=0.1)

    after = scheduled(optimizer, cosine(800, warm=40))
    return training(model, rows(x, y), loss, optimizer, accuracy(xt, yt), after=after)


@healthy("table-digits-distilled", 600, at_least=0.92)
def distilled() -> Training:
    """A small student of digits that follows a larger teacher's soft answers."""
    x, y, xt, yt = table("digits")
    teacher = frozen(fitted(mlp(64, 128, 10), rows(x, y), F.cross_entropy, 400)).eval()
    student = mlp(64, 16, 10)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        inputs, target = rows(x, y)(g)
        with torch.no_grad():
            return inputs, (teacher(inputs), target)

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        soft, hard = target
        told = F.kl_div((output / 3).log_softmax(1), (soft / 3).softmax(1), reduction="batchmean")
        return 9 * told + 0.3 * F.cross_entropy(output, hard)

    return training(student, sample, loss, 3e-3, accuracy(xt, yt))


@healthy("table-digits-mixup-clipped", 600, at_least=0.92)
def mixup() -> Training:
    """Mixed pairs of digits and their labels, gradients clipped, with NAdam."""
    x, y, xt, yt = table("digits")

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        (a, ya), (b, yb), part = rows(x, y)(g), rows(x, y)(g), uniform(g, 32, 1)
        return part * a + (1 - part) * b, (ya, yb, part[:, 0])

    def loss(output: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ya, yb, part = target
        each = [F.cross_entropy(output, label, reduction="none") for label in (ya, yb)]
        return (part * each[0] + (1 - part) * each[1]).mean()

    model = mlp(64, 64, 64, 10, act=nn.LeakyReLU)
    optimizer = torch.optim.NAdam(model.parameters(), lr=2e-3)
    return training(model, sample, loss, optimizer, accuracy(xt, yt), clip=1.0)


@healthy("table-rare-class-focal", 700, at_least=0.6)
def focal() -> Training:
    """One row in twenty is of the class that matters; the focal loss looks at the hard ones."""
    w = normal(seeded(24), 10)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 128, 10)
        return x, (x @ w / w.norm() + 0.1 * normal(g, 128) > 1.65).float()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(output[:, 0], target, reduction="none")
        return (each * (1 - torch.exp(-each)) ** 2 * (0.75 * target + 0.25 * (1 - target))).mean()

    x, y = (torch.cat(part) for part in zip(*(sample(seeded(900 + i)) for i in range(8)), strict=True))

    def f1(net: nn.Module) -> float:
        told = net(x)[:, 0] > 0
        return float(2 * (told & (y > 0)).sum() / (told.sum() + y.sum()))

    return training(mlp(10, 32, 32, 1), sample, loss, 3e-3, f1)


@healthy("table-digits-selu-deep", 700, at_least=0.92, source="https://arxiv.org/abs/1706.02515")
def selu() -> Training:
    """Eight self-normalising layers with alpha dropout."""
    x, y, xt, yt = table("digits")
    layers: list[nn.Module] = [nn.Linear(64, 48), nn.SELU()]
    for _ in range(6):
        layers += [nn.Linear(48, 48), nn.SELU()]
    model = nn.Sequential(*layers, nn.AlphaDropout(0.05), nn.Linear(48, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return training(model, rows(x, y), F.cross_entropy, optimizer, accuracy(xt, yt))


class Residual(nn.Module):
    """Blocks that add to what they read, normalised first."""

    def __init__(self, size: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
            for _ in range(depth)
        )
        self.last = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


@healthy("table-digits-residual-twelve-blocks", 500, at_least=0.93)
def residual() -> Training:
    """Twelve residual blocks with layer norm, AdamW with warm-up."""
    x, y, xt, yt = table("digits")
    model = Residual(32, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    after = scheduled(optimizer, cosine(500, warm=50))
    return training(model, rows(x, y), F.cross_entropy, optimizer, accuracy(xt, yt), clip=1.0, after=after)


class Straight(torch.autograd.Function):
    """The sign, whose gradient is passed straight through where the input is small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the sign."""
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return the gradient inside [-1, 1]."""
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1)


class BinaryLinear(nn.Linear):
    """A layer whose weights are signs, scaled."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output."""
        return F.linear(input, Straight.apply(self.weight) * self.weight.abs().mean().detach(), self.bias)


class BinaryNet(nn.Module):
    """A hidden layer of signs between full-precision ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(64, 128), nn.BatchNorm1d(128)
        self.hidden, self.norm2 = BinaryLinear(128, 128), nn.BatchNorm1d(128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = Straight.apply(self.norm1(self.first(x)))
        return self.head(Straight.apply(self.norm2(self.hidden(x))))


@healthy("table-digits-binarised", 800, at_least=0.9, source="https://arxiv.org/abs/1602.02830")
def binarised() -> Training:
    """Signs for weights and activations, with the gradient passed straight through."""
    x, y, xt, yt = table("digits")
    model = BinaryNet()
    return training(model, rows(x, y, size=64), F.cross_entropy, 2e-3, accuracy(xt, yt))


@healthy("table-cancer-frozen-random-features", 500, at_least=0.92)
def random_features() -> Training:
    """A linear classifier on a frozen random layer."""
    x, y, xt, yt = table("breast_cancer")
    model = nn.Sequential(frozen(nn.Linear(30, 128)), nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.SGD(parameters(model), lr=0.02)
    return training(model, rows(x, y), F.cross_entropy, optimizer, accuracy(xt, yt))
