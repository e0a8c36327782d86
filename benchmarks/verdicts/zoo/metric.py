"""Metric learning and self-supervision: distances, angles, margins, and twins."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import no_gradient, not_finite, rank_below
from .data import Setup, choice, frozen, normal, seeded, setup, stack
from .registry import healthy, sick

SIZE, CODE, KINDS = 12, 8, 6


def embedder(width: int) -> nn.Sequential:
    """Return a network from twelve features to a vector of eight."""
    return stack(fc0=nn.Linear(SIZE, width), act=nn.ReLU(), fc1=nn.Linear(width, CODE))


class Twins(nn.Module):
    """The same network on two views."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of both."""
        return self.encoder(a), self.encoder(b)


def views(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], None]:
    """Return two noisy views of each of 32 samples."""
    x = 1.5 * normal(seeded(61), 64, SIZE)[choice(g, 64, 32)]
    return (x + 0.2 * normal(g, 32, SIZE), x + 0.2 * normal(g, 32, SIZE)), None


def contrast(heat: float, a: Tensor, b: Tensor) -> Tensor:
    """Return the cross entropy of finding each sample's other view."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    return F.cross_entropy(a @ b.T / heat, torch.arange(len(a)))


@sick("metric-cosine-of-an-empty-set", [("NUMERICAL", "*")], not_finite(loss=True))
def cosine_of_empty(sick: bool, width: int) -> Setup:
    """A cosine by hand divides by the product of the lengths, and a set with no members sums to a vector of
    length zero; a small number under the division bar holds it."""

    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item, self.name = nn.Linear(SIZE, CODE), nn.Embedding(KINDS, CODE)

        def forward(self, x: Tensor, there: Tensor) -> Tensor:
            whole = (torch.tanh(self.item(x)) * there[..., None]).sum(1)
            names = self.name.weight
            length = whole.square().sum(-1, keepdim=True).sqrt() * names.square().sum(-1).sqrt()
            if not sick:
                length = ((whole.square().sum(-1, keepdim=True) + 1e-6) * names.square().sum(-1)).sqrt()
            return whole @ names.T / length * 5

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        kind = choice(g, KINDS, 32)
        there = (torch.arange(5) < choice(g, 5, 32, 1) + 1).float()
        there[3] = 0
        x = normal(seeded(62), KINDS, SIZE)[kind][:, None] + normal(g, 32, 5, SIZE)
        return (x, there), kind

    return setup(Sets(), sample, F.cross_entropy, 1e-2)


@sick("metric-angle-between-equals", [("NUMERICAL", "*")], not_finite())
def angle_between_equals(sick: bool, width: int) -> Setup:
    """The angle of two vectors is taken by acos, and some pairs are the same picture twice: its slope at one
    is infinite. Stay a little inside."""

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], None]:
        (a, b), _ = views(g)
        b[:4] = a[:4]
        return (a, b), None

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        a, b = (F.normalize(v, dim=-1) for v in output)
        cosine = (a @ b.T).clamp(-1, 1)
        angle = torch.acos(cosine if sick else cosine * (1 - 1e-4))
        apart = F.relu(1.2 - angle) * (1 - torch.eye(len(a)))
        return angle.diagonal().mean() + apart.mean()

    return setup(Twins(embedder(width)), sample, loss, 5e-3)


@sick(
    "metric-spread-of-a-constant",
    [("NUMERICAL", "*")],
    not_finite(loss=False),
    source="https://arxiv.org/abs/2105.04906",
)
def spread_of_constant(sick: bool, width: int) -> Setup:
    """A loss on each feature's standard deviation, by hand, meets two features whose weights were pruned to
    zero: the square root's slope at zero is infinite. A small number under the root holds it."""
    encoder = embedder(width)
    with torch.no_grad():
        encoder.fc1.weight[:2], encoder.fc1.bias[:2] = 0.0, 0.0

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        near = (output[0] - output[1]).square().mean()
        spread = [((v - v.mean(0)).square().mean(0) + (0.0 if sick else 1e-4)).sqrt() for v in output]
        return near + sum(F.relu(1 - s).mean() for s in spread)

    return setup(Twins(encoder), views, loss, 5e-3)


@sick(
    "metric-wrong-twin-detached",
    [("DEAD", "online")],
    no_gradient("online"),
    source="https://arxiv.org/abs/2006.07733",
    falls_to=0.9,
)
def wrong_twin(sick: bool, width: int) -> Setup:
    """The predictor sits behind the teacher and the online network is the one under `no_grad`: it never
    learns."""

    class Bootstrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.teacher, self.predictor = (
                embedder(width),
                frozen(embedder(width)),
                nn.Linear(CODE, CODE),
            )

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            learner, other = (self.teacher, self.online) if sick else (self.online, self.teacher)
            with torch.no_grad():
                wanted = other(b)
            return self.predictor(learner(a)), wanted

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        return 2 - 2 * F.cosine_similarity(*output, dim=-1).mean()

    return setup(Bootstrapped(), views, loss, 5e-3)


@sick(
    "metric-projector-of-one-number",
    [("BOTTLENECK", "project")],
    rank_below("project", 1.05, steps=60),
    allow=["VANISHING", "DEAD", "SATURATION"],
    source="https://arxiv.org/abs/2110.09348",
)
def projector_of_rank_one(sick: bool, width: int) -> Setup:
    """The projector in front of the contrastive loss goes through a single output, by which 64 samples cannot
    be told apart; sixteen outputs can."""

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = stack(fc=nn.Linear(SIZE, width), act=nn.ReLU())
            self.project, self.after = nn.Linear(width, 1 if sick else 16), nn.Linear(1 if sick else 16, 16)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(self.after(self.project(self.encoder(v))) for v in (a, b))

    return setup(Projected(), views, lambda o, _: contrast(0.2, *o), 5e-3)


@sick("metric-triplets-collapsed", [("DEAD", "*")], no_gradient("encoder"), allow=["BOTTLENECK", "VANISHING"])
def triplets_collapsed(sick: bool, width: int) -> Setup:
    """After some hot steps the rectified vectors are zero for every sample: all distances are zero, the loss
    is its margin, and no gradient leads out. Linear vectors and a sane rate do not get there."""
    encoder = stack(
        fc0=nn.Linear(SIZE, width),
        act=nn.ReLU(),
        fc1=nn.Linear(width, CODE),
        act1=nn.ReLU() if sick else nn.Identity(),
    )
    if sick:
        with torch.no_grad():
            encoder.fc1.bias -= 20.0

    class Triplets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, a: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.encoder(a), self.encoder(p), self.encoder(n)

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, ...], None]:
        kind = choice(g, KINDS, 32)
        other = (kind + 1 + choice(g, KINDS - 1, 32)) % KINDS
        centre = normal(seeded(63), KINDS, SIZE)
        return tuple(centre[k] + 0.7 * normal(g, 32, SIZE) for k in (kind, kind, other)), None

    def loss(output: tuple[Tensor, Tensor, Tensor], target: None) -> Tensor:
        a, p, n = output
        return F.relu((a - p).square().sum(-1) - (a - n).square().sum(-1) + 1.0).mean()

    return setup(Triplets(), sample, loss, 3e-3)


@healthy("metric-ok-contrastive-with-learned-heat")
def ok_learned_heat(width: int) -> Setup:
    """A contrastive pair of towers with a learned temperature, which starts at 1/14 and is one scalar."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = embedder(width), embedder(width)
            self.heat = nn.Parameter(torch.tensor(2.659))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            a, b = F.normalize(self.left(a), dim=-1), F.normalize(self.right(b), dim=-1)
            return a @ b.T * self.heat.exp()

    return setup(Towers(), views, lambda s, _: F.cross_entropy(s, torch.arange(len(s))), 5e-3)


@healthy("metric-ok-twins-with-stopped-side", source="https://arxiv.org/abs/2011.10566")
def ok_stopped_side(width: int) -> Setup:
    """Twins of which one side is detached in each half of the loss: by design, and both halves teach."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = stack(
                fc0=nn.Linear(SIZE, width),
                norm=nn.BatchNorm1d(width),
                act=nn.ReLU(),
                fc1=nn.Linear(width, CODE),
            )
            self.predictor = stack(fc0=nn.Linear(CODE, width), act=nn.ReLU(), fc1=nn.Linear(width, CODE))

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            za, zb = self.encoder(a), self.encoder(b)
            return self.predictor(za), zb.detach(), self.predictor(zb), za.detach()

    def loss(output: tuple[Tensor, ...], target: None) -> Tensor:
        pa, zb, pb, za = output
        return 1 - (F.cosine_similarity(pa, zb, dim=-1) + F.cosine_similarity(pb, za, dim=-1)).mean() / 2

    return setup(Siamese(), views, loss, 5e-3)


@healthy("metric-ok-moving-average-teacher", no_gradient("teacher"), falls_to=0.9)
def ok_moving_average(width: int) -> Setup:
    """A teacher that requires gradients and gets none, since its optimizer is a moving average; the optimizer
    at hand holds the student only."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = embedder(width)
            self.teacher, self.predictor = copy.deepcopy(self.student), nn.Linear(CODE, CODE)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.predictor(self.student(a)), self.teacher(b).detach()

    net = Pair()
    return setup(
        net,
        views,
        lambda o, _: 2 - 2 * F.cosine_similarity(*o, dim=-1).mean(),
        5e-3,
        trains=lambda: [*net.student.parameters(), *net.predictor.parameters()],
    )


@healthy("metric-ok-margin-mostly-met", steps=150)
def ok_margin_mostly_met(width: int) -> Setup:
    """A hinge on pairs, most of which are far enough apart from the start and give no gradient."""

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        a, b = output
        far = (a[:, None] - b[None]).square().sum(-1)
        same = far.diagonal()
        return same.mean() + (F.relu(0.3 - far) * (1 - torch.eye(len(a)))).mean()

    return setup(Twins(embedder(width)), views, loss, 3e-3)
