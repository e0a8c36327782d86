"""Energy-based and Bayesian models, and healthy ones from public reports that only look suspicious."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from . import data
from .claims import huge, training
from .contact8b_1 import boxes
from .registry import FLOAT32, Setup, healthy, sick

# ------------------------------------------------------------------------------------ energy-based


class EnergyModel(nn.Module):
    """An energy of points; it gives those of the data and of samples that a short chain draws."""

    def __init__(self, size: int, width: int, steps: int = 10, rate: float = 0.02) -> None:
        super().__init__()
        self.energy = nn.Sequential(
            nn.Linear(size, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )
        self.steps, self.rate = steps, rate

    def draw(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x)
            x = x - self.rate * slope.clamp(-1, 1) + 0.01 * torch.randn_like(x)
        return x.detach()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.energy(x), self.energy(self.draw(torch.randn_like(x)))


def runs_away(setup: Setup) -> tuple[bool, str]:
    """Within twenty steps the size of the loss and of the gradients grows without bound."""
    seen = [(abs(step.loss), step.norm("*")) for step in training(setup, 20)]
    loss, norm = max(s[0] for s in seen), max(s[1] for s in seen)
    ends = not math.isfinite(seen[-1][0])
    return ends or (loss > 100 and norm > 20 * seen[0][1]), f"largest loss {loss:.2g}, gradient {norm:.2g}"


@sick(
    "contact8b-energy-divergence",
    [("UNSTABLE", "*")],
    runs_away,
    allow=("EXPLODING", "NUMERICAL"),
    source="https://github.com/wgrathwohl/JEM/issues/4",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def divergence(sick: bool, width: int) -> Setup:
    """The report: the loss of an energy-based model often blows up and diverges. Nothing keeps the energies
    near zero, so those of the data and of the samples run apart, faster with every step; a small penalty
    on the squared energies, which the answer proposes, repairs it."""
    model = EnergyModel(8, width)
    ring = data.factors(8, 3, 64)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        true, drawn = output
        penalty = 0.0 if sick else 0.1 * (true**2 + drawn**2).mean()
        return true.mean() - drawn.mean() + penalty

    return data.trained(data.setup(model, ring, loss, data.sgd(0.07, 0.9)), 20)


# ---------------------------------------------------------------------------------------- Bayesian


class BayesLinear(nn.Module):
    """A linear layer whose weights are drawn from independent normal distributions."""

    def __init__(self, inputs: int, outputs: int, prior: float = 0.2) -> None:
        super().__init__()
        self.weight_mu = nn.Parameter(0.05 * torch.randn(outputs, inputs))
        self.weight_rho = nn.Parameter(torch.full((outputs, inputs), math.log(math.expm1(prior))))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.prior = prior

    def forward(self, x: Tensor) -> Tensor:
        sigma = F.softplus(self.weight_rho)
        mean, spread = F.linear(x, self.weight_mu, self.bias), F.linear(x**2, sigma**2)
        return mean + (spread + 1e-8).sqrt() * torch.randn_like(mean)

    def divergence(self) -> Tensor:
        sigma = F.softplus(self.weight_rho)
        square = (sigma**2 + self.weight_mu**2) / self.prior**2
        return (0.5 * (square - 1) - torch.log(sigma / self.prior)).sum()


class BayesNet(nn.Module):
    """A network of two such layers; it gives the answer and the divergence from the prior."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = BayesLinear(inputs, width), BayesLinear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        answer = self.layer2(torch.tanh(self.layer1(x)))
        return answer, self.layer1.divergence() + self.layer2.divergence()


def divergence_rises(setup: Setup) -> tuple[bool, str]:
    """The divergence from the prior rises while the model trains."""
    begin = float(setup.model(setup.make_batch())[1])
    for _ in training(setup, 60):
        pass
    end = float(setup.model(setup.make_batch())[1])
    return end > 1.5 * begin, f"divergence rises from {begin:.3g} to {end:.3g}"


@healthy(
    "contact8b-bayesian-risingdivergence",
    divergence_rises,
    source="https://github.com/Harry24k/bayesian-neural-network-pytorch/issues/10",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rising_divergence(width: int) -> Setup:
    """The report finds that the divergence of a Bayesian network's weights from their prior increases, which
    is normal. It begins near the prior, and what it learns takes it from there while the whole loss
    falls."""
    points, total = data.surface(6, 64), 2000

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        answer, divergence = output
        return 2 * F.mse_loss(answer, target) + divergence / total

    return data.setup(BayesNet(6, width), points, loss, 1e-2)


# --------------------------------------------------------------------------------- self-supervised


class SimSiam(nn.Module):
    """An encoder and a predictor for two views of each picture; the other view is held fixed."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * channels, size, bias=False),
            nn.BatchNorm1d(size, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(size, size // 2, bias=False),
            nn.BatchNorm1d(size // 2),
            nn.ReLU(),
            nn.Linear(size // 2, size),
        )

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        z1, z2 = self.encoder(first), self.encoder(second)
        return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()


def negative(setup: Setup) -> tuple[bool, str]:
    """The loss is negative after some steps."""
    *_, last = training(setup, 15)
    return last.loss < -0.1, f"loss after 15 steps {last.loss:.2g}"


@healthy(
    "contact8b-siamese-negativeloss",
    negative,
    source="https://github.com/facebookresearch/simsiam/issues/44",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def negative_loss(width: int) -> Setup:
    """The reports wonder that the loss is negative; the answer is that it is the negative cosine of two
    views, so that minus one is its best. The views that are held fixed get no gradient by design, and
    the embeddings of different pictures stay apart."""
    pictures = data.textures(8, number=48)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
        x, _ = pictures(g)
        return tuple(x + 0.3 * data.normal(g, *x.shape) for _ in range(2)), None

    def loss(output: tuple[Tensor, ...], target: None) -> Tensor:
        p1, p2, z1, z2 = output
        return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2

    return data.setup(SimSiam(width // 2, width), sample, loss, data.sgd(0.05, 0.9))


# ----------------------------------------------------------------------------- architecture search


class Choice(nn.Module):
    """A layer of a supernet: one of its operations is drawn in every step."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.Conv2d(channels, channels, 5, padding=2, bias=False),
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2, bias=False),
        ]
        self.ops = nn.ModuleList(nn.Sequential(c, nn.BatchNorm2d(channels), nn.ReLU()) for c in convs)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ops[int(torch.randint(len(self.ops), ()))](x)


def one_path(setup: Setup) -> tuple[bool, str]:
    """In the first step two of three operations of every layer get no gradient."""
    first, *_ = training(setup, 1)
    parts = [f"layers.{i}.ops.{k}" for i in range(3) for k in range(3)]
    idle = sum(first.norm(part) == 0 for part in parts)
    return idle == 6, f"{idle} of {len(parts)} operations without gradient"


@healthy(
    "contact8b-supernet-onepath",
    one_path,
    source="https://github.com/ShunLu91/Single-Path-One-Shot-NAS/issues/11",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def one_path_supernet(width: int) -> Setup:
    """The report asks whether the paths of a supernet that are not drawn must be frozen. They need not:
    those that take no part in a step have no gradient in it and are left as they are, and each has its
    turn."""
    channels = width // 4
    model = data.stack(
        stem=nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        ),
        layers=nn.Sequential(*(Choice(channels) for _ in range(3))),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(channels, 4),
    )
    return data.setup(model, data.textures(4), F.cross_entropy, 3e-3)


# --------------------------------------------------------------------------- losses of unusual size


def heads(number: int = 12, size: int = 24) -> data.Sample:
    """Noisy pictures of three small heads; the target is a map that falls off with the distance."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        place = size * data.uniform(g, number, 3, 2, 1, 1)
        near = ((rows - place[:, :, 0]) ** 2 + (columns - place[:, :, 1]) ** 2).sqrt().amin(1)[:, None]
        return (near < 2).float() + 0.3 * data.normal(g, number, 1, size, size), 1 / (1 + near**1.2 / 4)

    return sample


@healthy(
    "contact8b-counting-hugeloss",
    huge("*", 500.0),
    source="https://github.com/dk-liang/FIDTM/issues/39",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def huge_loss(width: int) -> Setup:
    """The report finds a loss of thousands that falls slowly, and the answer is that this is its normal
    value: squared errors are summed over all pixels without any normalisation. Adam does not mind the
    scale of the gradients, and the model learns."""
    channels = width // 4
    model = data.stack(
        encoder=nn.Sequential(
            nn.Conv2d(1, channels, 5, padding=2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 5, padding=2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ),
        fidt_head=nn.Conv2d(channels, 1, 3, padding=1),
    )
    return data.setup(model, heads(), nn.MSELoss(reduction="sum"), 3e-3)


def small_loss(setup: Setup) -> tuple[bool, str]:
    """The first loss is so small that it looks as if there were nothing to learn."""
    loss = float(setup.loss_fn(setup.model(setup.make_batch())))
    return loss < 0.05, f"first loss {loss:.2g}"


def focal(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean focal loss over all cells and classes."""
    gap = F.binary_cross_entropy_with_logits(output, target, reduction="none")
    weight = torch.where(target > 0, 0.25, 0.75)
    return (weight * (1 - torch.exp(-gap)) ** 2 * gap).mean()


@healthy(
    "contact8b-detection-smallfocal",
    small_loss,
    source="https://github.com/Longqi-S/Focal-Loss/issues/1",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def small_focal(width: int) -> Setup:
    """The reports wonder at the size of the focal loss; the answer is that it is usually very small, since
    almost all cells are easy background that it scales down. It begins at a few hundredths, its
    gradients are small too, and it learns."""
    channels = width // 2
    model = data.stack(
        backbone=nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ),
        cls_head=nn.Conv2d(channels, 1, 3, padding=1),
    )
    nn.init.normal_(model.cls_head.weight, std=0.01)
    nn.init.constant_(model.cls_head.bias, -math.log(0.99 / 0.01))
    scene = boxes()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, target = scene(g)
        return x, target[..., 4][:, None]

    return data.setup(model, sample, focal, 3e-3)
