"""Healthy models of the fields of `contact1b_1` and `contact1b_2`, which look sick in one way or another.

Each has a part that gets no gradient, is mostly off, or lies where its function is flat, and trains well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, flat, no_gradient, training
from .contact1b_2 import FastSigmoid, Leaky
from .data import choice, normal, seeded, series, setup, uniform
from .registry import FLOAT32, Setup, healthy

W = 16


def mostly(module: str, share: float, what: Callable[[Tensor], Tensor], *, steps: int = 5) -> Claim:
    """More than a share of a module's output is as `what` says, after some steps."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps, (module,))
        seen = float(what(last.outputs[module].detach()).float().mean())
        return seen > share, f"{seen:.0%} of {module} is so"

    return claim


# -------------------------------------------------------------------------------- a radiance field


class RadianceField(nn.Module):
    """Density and colour at each point of a ray, and what a camera sees along it."""

    def __init__(self, width: int):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(26, 4 * width), nn.ReLU(), nn.Linear(4 * width, 4 * width), nn.ReLU()
        )
        self.raw, self.density = nn.Linear(4 * width, 1), nn.ReLU()
        self.colour = nn.Linear(4 * width, 3)

    def forward(self, points: Tensor) -> Tensor:
        waves = [f(2.0**k * points) for k in range(-1, 5) for f in (torch.sin, torch.cos)]
        h = self.trunk(torch.cat([points, *waves], -1))
        alpha = 1 - torch.exp(-self.density(self.raw(h)).squeeze(-1) * 4 / points.shape[1])
        passing = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], -1), -1)[:, :-1]
        seen = (alpha * passing)[..., None]
        return (seen * self.colour(h).sigmoid()).sum(1) + 1 - seen.sum(1)


@healthy(
    "contact1b-nerf-empty_space",
    mostly("density", 0.5, lambda d: d == 0, steps=100),
    source="https://github.com/kwea123/nerf_pl/issues/51",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def empty_space(width: int) -> Setup:
    """Most of a scene is empty, so that most densities come to lie where their ReLU is off; a few of the
    points on each ray carry the gradient, and the picture is learned."""
    steps = torch.linspace(-2, 2, 24)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        height, turn = 3 * uniform(g, 48) - 1.5, 0.5 * normal(g, 48)
        along = torch.stack([turn.cos(), turn.sin()], -1)
        across = torch.stack([-turn.sin(), turn.cos()], -1)
        points = height[:, None, None] * across[:, None] + steps[:, None] * along[:, None]
        inside = (height.abs() < 0.7).float()[:, None]
        return points, inside * torch.tensor([0.9, 0.2, 0.1]) + 1 - inside

    return setup(RadianceField(width), sample, F.mse_loss, 3e-3)


# ------------------------------------------------------------------ a policy from logged actions


class OfflineAgent(nn.Module):
    """The value of a state, that of an action by a network and its slow copy, and a Gaussian policy."""

    def __init__(self, width: int):
        super().__init__()
        self.q = nn.Sequential(nn.Linear(8, 4 * width), nn.ReLU(), nn.Linear(4 * width, 1))
        self.q_slow = copy.deepcopy(self.q).requires_grad_(False)
        self.v = nn.Sequential(nn.Linear(6, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
        self.policy = nn.Sequential(nn.Linear(6, 2 * width), nn.ReLU(), nn.Linear(2 * width, 4))

    def forward(self, s: Tensor, a: Tensor, r: Tensor, following: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            for slow, fast in zip(self.q_slow.parameters(), self.q.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
            target = r + 0.5 * self.v(following).squeeze(-1)
            logged = self.q_slow(torch.cat([s, a], -1)).squeeze(-1)
        value = self.v(s).squeeze(-1)
        mean, log_std = self.policy(s).chunk(2, -1)
        spread = log_std.clamp(-1, 1).exp()
        log_prob = torch.distributions.Normal(mean, spread).log_prob(a).sum(-1)
        weight = torch.exp(6 * (logged - value.detach())).clamp(max=5)
        td = self.q(torch.cat([s, a], -1)).squeeze(-1) - target
        return {"td": td, "ahead": logged - value, "log_prob": log_prob, "weight": weight}


def light(share: float, *, steps: int = 60) -> Claim:
    """More than a share of the samples weighs less than a tenth in the policy's loss."""

    def claim(setup: Setup) -> tuple[bool, str]:
        for _ in training(setup, steps):
            pass
        seen = float((setup.model(*setup.make_batch())["weight"] < 0.1).float().mean())
        return seen > share, f"{seen:.0%} of the samples weigh next to nothing"

    return claim


@healthy("contact1b-rl-advantage_weights", light(0.25, steps=150), widths=(W,), dtypes=(FLOAT32,))
def advantage_weights(width: int) -> Setup:
    """A policy is drawn from logged actions, each weighted by the exponential of its advantage: many of them
    weigh next to nothing beside the best, which is the point of it."""
    aim = normal(seeded(302), 6, 2) / 3

    def sample(g: Generator) -> tuple[tuple[Tensor, ...], None]:
        s, a = normal(g, 128, 6), 2 * uniform(g, 128, 2) - 1
        r = -(a - torch.tanh(s @ aim)).square().sum(-1)
        return (s, a, r, 0.9 * s + 0.4 * normal(g, 128, 6)), None

    def loss(out: dict[str, Tensor], _: None) -> Tensor:
        ahead = out["ahead"]
        expectile = (torch.where(ahead > 0, 0.8, 0.2) * ahead.square()).mean()
        return out["td"].square().mean() + expectile - (out["weight"] * out["log_prob"]).mean()

    return setup(OfflineAgent(width), sample, loss, 3e-3)


# ------------------------------------------------------------------- a target that follows slowly


class Bootstrapped(nn.Module):
    """Predicts from one view the embedding of another by a target that follows the network slowly."""

    def __init__(self, width: int):
        super().__init__()
        self.online = nn.Sequential(
            nn.Linear(12, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, one: Tensor, two: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
                slow.lerp_(fast, 0.02)
            goals = self.target(two), self.target(one)
        return [
            (self.predictor(self.online(view)), goal) for view, goal in zip((one, two), goals, strict=True)
        ]


@healthy(
    "contact1b-contrastive-slow_target",
    no_gradient("target"),
    widths=(W,),
    dtypes=(FLOAT32,),
)
def slow_target(width: int) -> Setup:
    """Half of the network never gets a gradient and no negatives keep the samples apart; the target follows
    by a moving average, as it is meant to, and nothing collapses."""
    mix = normal(seeded(303), 4, 12)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
        content = normal(g, 64, 4) @ mix
        return (content + 0.5 * normal(g, 64, 12), content + 0.5 * normal(g, 64, 12)), None

    def loss(pairs: list[tuple[Tensor, Tensor]], _: None) -> Tensor:
        return sum((2 - 2 * F.cosine_similarity(p, t).mean() for p, t in pairs), torch.zeros(()))

    return setup(Bootstrapped(width), sample, loss, 3e-3)


# -------------------------------------------------------------------------- mostly background


class DenseDetector(nn.Module):
    """Scores each place of a map for each class, starting from the belief that nothing is there."""

    def __init__(self, width: int):
        super().__init__()
        self.tower = nn.ModuleList(nn.Conv2d(n, width, 3, padding=1) for n in (3, width))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(2))
        self.scores = nn.Conv2d(width, 3, 3, padding=1)
        self.sides = nn.Conv2d(width, 2, 3, padding=1)
        nn.init.normal_(self.scores.weight, std=0.01)
        self.scores.bias = nn.Parameter(torch.full((3,), -math.log((1 - 0.005) / 0.005)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for conv, norm in zip(self.tower, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return {"scores": self.scores(x), "sides": F.softplus(self.sides(x))}


@healthy(
    "contact1b-detection-rare_objects",
    flat("scores", "sigmoid of", 0.9),
    source="https://github.com/JIA-Lab-research/PanopticFCN/issues/6",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def rare_objects(width: int) -> Setup:
    """Nearly all places are background, and the scores' bias starts at 0.5 %, so that all sigmoids lie at
    their flat end; the focal loss is taken of the logits and is what needs that start."""

    def sample(g: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        kind, place = choice(g, 3, 8), 2 + choice(g, 12, 8, 2)
        size = 1 + choice(g, 2, 8, 2)
        picture, score, sides = torch.zeros(8, 3, 16, 16), torch.zeros(8, 3, 16, 16), torch.zeros(8, 2)
        for i in range(8):
            (y, x), (h, w) = place[i].tolist(), size[i].tolist()
            picture[i, kind[i], y - h : y + h + 1, x - w : x + w + 1] = 1
            score[i, kind[i], y, x] = 1
            sides[i] = size[i].float()
        return picture + 0.2 * normal(g, 8, 3, 16, 16), {"score": score, "sides": sides}

    def loss(out: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
        score, p = target["score"], out["scores"].sigmoid()
        cross = F.binary_cross_entropy_with_logits(out["scores"], score, reduction="none")
        weight = torch.where(score > 0, 0.25 * (1 - p).square(), 0.75 * p.square())
        found = out["sides"].permute(0, 2, 3, 1)[score.amax(1) > 0]
        return (weight * cross).sum() / 8 + F.l1_loss(found, target["sides"])

    return setup(DenseDetector(width), sample, loss, 3e-3)


# ------------------------------------------------------------------------------- sparse spikes


class SpikingClassifier(nn.Module):
    """Two layers of leaky neurons over a sequence, and a class from the mean potential of a third."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(4, 4 * width), Leaky(FastSigmoid, 1.0, beta=0.9)
        self.fc2, self.lif2 = nn.Linear(4 * width, 4 * width), Leaky(FastSigmoid, 1.0, beta=0.9)
        self.fc3 = nn.Linear(4 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.lif2(self.fc2(self.lif1(self.fc1(x.transpose(0, 1)))))
        mem, total = torch.zeros(x.shape[0], 3), torch.zeros(x.shape[0], 3)
        for now in self.fc3(spikes):
            mem = 0.9 * mem + now
            total = total + mem
        return total / len(spikes)


@healthy(
    "contact1b-spiking-sparse_spikes",
    mostly("lif2", 0.85, lambda s: s == 0),
    widths=(W,),
    dtypes=(FLOAT32,),
)
def sparse_spikes(width: int) -> Setup:
    """Nine of ten neurons are silent at any step and the derivative of their step is made up; enough of them
    come near the threshold, and the network learns."""
    return setup(SpikingClassifier(width), series(16, 32), F.cross_entropy, 5e-3)
