"""Cases re-created from public reports: balanced losses, policies, metric learning, spikes; healthy ones."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.distributions import Normal

from .claims import alike, flat, jumps, rank_below, tiny, weak, zero_at_first
from .data import choice, clusters, normal, seeded, setup, sgd, textures, trained, uniform
from .registry import FLOAT32, Setup, healthy, sick

W = 32


# ----------------------------------------------------------------------------------- loss balancing


class _Weighted(nn.Module):
    def __init__(self, floor: float) -> None:
        super().__init__()
        self.params, self.floor = nn.Parameter(torch.ones(2)), floor

    def forward(self, losses: list[Tensor]) -> Tensor:
        total = torch.zeros(())
        for sigma, part in zip(self.params, losses, strict=True):
            total = total + 0.5 / (sigma.square() + self.floor) * part + torch.log(1 + sigma.square())
        return total


class _TwoTasks(nn.Module):
    def __init__(self, width: int, floor: float) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width))
        self.price, self.rank = nn.Linear(width, 1), nn.Linear(width, 1)
        self.awl = _Weighted(floor)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        a, b = F.relu(self.shared(left)), F.relu(self.shared(right))
        return {"price": self.price(a), "gap": (self.rank(a) - self.rank(b)).squeeze(1)}


@sick(
    "contact3b-mtl-zero-hinge",
    expect=[("UNSTABLE", "*")],
    allow=["EXPLODING", "NUMERICAL", "VANISHING"],
    claim=jumps(50, steps=60),
    source="https://github.com/Mikoto10032/AutomaticWeightedLoss/issues/2",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def zero_hinge(sick: bool, width: int) -> Setup:
    """A regression and a hinge are weighed by learned uncertainties: the hinge is zero on most batches, so
    its sigma sinks towards zero and through it, and the next pair inside the margin is weighed by one over
    its square. Repaired by a floor under the square."""
    w = normal(seeded(41), 8, 2) / math.sqrt(8)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        left, right = normal(g, 32, 8), normal(g, 32, 8)
        order = ((left - right) @ w[:, 1]).sign()
        right = right - 1.5 * order[:, None] * w[:, 1] / w[:, 1].square().sum()
        return (left, right), (torch.sin(2 * left @ w[:, :1]), order)

    model = _TwoTasks(width, floor=0.0 if sick else 0.1)

    def loss(output: dict[str, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        hinge = F.margin_ranking_loss(output["gap"], torch.zeros(32), target[1], margin=0.3)
        return model.awl([F.mse_loss(output["price"], target[0]), hinge])

    return setup(model, sample, loss, sgd(5e-2, momentum=0.9))


# ----------------------------------------------------------------------------------------- a policy


class _ActorCritic(nn.Module):
    def __init__(self, width: int, normalise: bool) -> None:
        super().__init__()
        self.normalise = normalise
        self.body = nn.ModuleDict({"fc1": nn.Linear(6, width), "fc2": nn.Linear(width, width)})
        self.mu, self.value = nn.Linear(width, 2), nn.Linear(width, 1)
        self.log_std = nn.Parameter(torch.full((2,), -0.5))

    def forward(self, obs: Tensor) -> tuple[Normal, Tensor]:
        if self.normalise:
            obs = (obs - obs.mean(0)) / (obs.std(0) + 1e-6)
        h = torch.tanh(self.body["fc1"](obs))
        h = torch.tanh(self.body["fc2"](h))
        return Normal(torch.tanh(self.mu(h)), self.log_std.exp()), self.value(h).squeeze(-1)


@sick(
    "contact3b-ppo-saturated",
    expect=[("SATURATION", "body")],
    allow=["VANISHING", "DEAD", "BOTTLENECK", "EXPLODING", "UNSTABLE"],
    claim=flat("body.fc1", "tanh of", 0.8),
    source="https://github.com/hill-a/stable-baselines/issues/1018",
    steps=200,
    falls_to=0.6,
    widths=(W,),
    dtypes=(FLOAT32,),
)
def ppo(sick: bool, width: int) -> Setup:
    """PPO with continuous actions: observations in millimetres put the tanh layers of the shared body at
    their ends, so the actor can hardly tell one state from the next. Repaired by normalised observations."""
    best = normal(seeded(42), 6, 2) / math.sqrt(6)

    def sample(g: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        state = normal(g, 64, 6)
        action = 0.6 * normal(g, 64, 2)
        reward = -(action - torch.tanh(state @ best)).square().sum(1) + 2 * torch.tanh(state[:, 0])
        old = Normal(torch.zeros(2), 0.6).log_prob(action).sum(1)
        return 300 * state + 500, {"action": action, "reward": reward, "old": old}

    def loss(output: tuple[Normal, Tensor], batch: dict[str, Tensor]) -> Tensor:
        policy, value = output
        advantage = batch["reward"] - value.detach()
        advantage = (advantage - advantage.mean()) / advantage.std()
        ratio = (policy.log_prob(batch["action"]).sum(1) - batch["old"]).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        return -surrogate + 0.5 * F.mse_loss(value, batch["reward"]) - 0.01 * policy.entropy().mean()

    return setup(_ActorCritic(width, normalise=not sick), sample, loss, 3e-3)


# ----------------------------------------------------------------------------------- metric learning


class _Embedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.proj = nn.Linear(width, 16)

    def forward(self, image: Tensor) -> Tensor:
        h = F.relu(self.conv2(F.relu(self.conv1(image)))).mean((2, 3))
        return F.normalize(self.proj(h), dim=1)


def _triplet(hardest: bool, margin: float = 0.3) -> Any:
    def loss(z: Tensor, kind: Tensor) -> Tensor:
        apart = (z[:, None] - z[None]).square().sum(-1)
        same = kind[:, None] == kind[None]
        far = torch.where(same, apart, -torch.inf).amax(1)
        away = torch.where(same, torch.inf, apart)
        if hardest:
            return F.relu(far - away.amin(1) + margin).mean()
        near = torch.where(same, apart, 0).sum(1) / same.sum(1)
        ranked = away.sort(1).values[:, : len(z) // 2]
        return F.relu(near[:, None] - ranked + margin).mean()

    return loss


@sick(
    "contact3b-triplet-hardest",
    expect=[("BOTTLENECK", "*")],
    allow=["VANISHING", "DEAD", "UNSTABLE", "SATURATION"],
    claim=alike("proj", 0.15),
    source="https://github.com/wanggrun/triplet/issues/1",
    steps=150,
    widths=(W,),
    dtypes=(FLOAT32,),
)
def triplet(sick: bool, width: int) -> Setup:
    """A network is trained with the hardest triplets of each batch until the loss stands at the margin: all
    pictures have the same embedding. Repaired by a mean over the negatives of the nearer ranks."""
    noisy = textures(kinds=6, number=36)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        image, kind = noisy(g)
        return image + 2.0 * normal(g, *image.shape), kind

    ready = setup(_Embedder(width), sample, _triplet(hardest=sick), 1e-2)
    return trained(ready, 60) if sick else ready


# -------------------------------------------------------------------------------------------- spikes


class _Rectangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v >= 0).to(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grads[0] * (v.abs() < 0.05).to(v)


class _Arc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v >= 0).to(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grads[0] / (1 + (math.pi * v).square())


class _Lif(nn.Module):
    def __init__(self, spike: Any, tau: float = 2.0) -> None:
        super().__init__()
        self.spike, self.tau = spike, tau

    def forward(self, current: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(current[0]), []
        for drive in current:
            v = v + (drive - v) / self.tau
            spikes.append(self.spike.apply(v - 1.0))
            v = v * (1 - spikes[-1].detach())
        return torch.stack(spikes)


class _Spiking(nn.Module):
    def __init__(self, width: int, spike: Any, depth: int = 6) -> None:
        super().__init__()
        sizes = [12] + [2 * width] * depth
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for fc in layers:
            nn.init.normal_(fc.weight, std=3.5 / math.sqrt(fc.in_features))
        self.fcs = nn.ModuleList(layers)
        self.lif = nn.ModuleList([_Lif(spike) for _ in range(depth)])
        self.readout = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor, steps: int = 6) -> Tensor:
        h = x.expand(steps, *x.shape)
        for fc, lif in zip(self.fcs, self.lif, strict=True):
            h = lif(fc(h))
        return self.readout(h.mean(0))


@sick(
    "contact3b-snn-rectangle",
    expect=[("VANISHING", "*")],
    allow=["DEAD", "SATURATION", "BOTTLENECK"],
    claim=weak("fcs.0", "fcs.5", 1e-2),
    source="https://github.com/fangwei123456/spikingjelly/issues/190",
    steps=200,
    widths=(W,),
    dtypes=(FLOAT32,),
)
def snn(sick: bool, width: int) -> Setup:
    """A deep spiking network whose surrogate slope is a narrow rectangle: few potentials lie in it, so a
    part of the gradient is lost at each layer and the weights hardly change. Repaired by an arctangent."""
    return setup(_Spiking(width, _Rectangle if sick else _Arc), clusters(12, 4), F.cross_entropy, 2e-3)


# ---------------------------------------------------------------------------------- the healthy ones


class _FirstCnn(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.conv1 = nn.Conv2d(3, width, 3)
        self.conv2 = nn.Conv2d(width, width, 3)
        self.fc = nn.Linear(width * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(self.norm(x)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


@healthy("contact3b-cnn-bytes", widths=(W,), dtypes=(FLOAT32,))
def first_cnn(width: int) -> Setup:
    """A beginner's CNN on pictures of 0 to 255: the first module normalises them, and it learns well."""
    picture = textures()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        image, kind = picture(g)
        return (110 + 50 * image).clamp(0, 255).round(), kind

    return setup(_FirstCnn(width), sample, F.cross_entropy, 2e-3)


@healthy("contact3b-labels-rare", widths=(W,), dtypes=(FLOAT32,), steps=200)
def rare_labels(width: int) -> Setup:
    """Eight labels of which each is on in three samples of a hundred: positives weigh thirty times as much,
    and the loss jumps with their number from batch to batch, but it falls."""
    planes = normal(seeded(43), 10, 8) / math.sqrt(10)
    weight = torch.full((8,), 30.0)
    model = nn.Sequential(nn.Linear(10, 2 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2 * width, 8))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 10)
        return x, (x @ planes > 1.9).float()

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)

    return setup(model, sample, loss, 3e-3)


class _Factors(nn.Module):
    def __init__(self, users: int, items: int, rank: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, rank), nn.Embedding(items, rank)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for table in (self.user, self.item, self.user_bias, self.item_bias):
            nn.init.normal_(table.weight, std=0.03)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        both = (self.user(user) * self.item(item)).sum(1, keepdim=True)
        return (both + self.user_bias(user) + self.item_bias(item)).squeeze(1)


@healthy("contact3b-recommender-sparse", tiny("item", 0.05), steps=300, widths=(W,), dtypes=(FLOAT32,))
def recommender(width: int) -> Setup:
    """Matrix factorisation from small factors: at first their products and gradients are next to nothing,
    and most rows are in no batch, but it learns."""
    g0 = seeded(44)
    taste, trait = normal(g0, 200, 3), normal(g0, 100, 3)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        user, item = choice(g, 200, 128), choice(g, 100, 128)
        return (user, item), (taste[user] * trait[item]).sum(1) + 0.1 * normal(g, 128)

    return setup(_Factors(200, 100, width // 4), sample, F.mse_loss, 3e-2)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True)
        self.delta = nn.Linear(width, 1)
        nn.init.zeros_(self.delta.weight)
        nn.init.zeros_(self.delta.bias)

    def forward(self, window: Tensor) -> Tensor:
        level = window[:, -1]
        scale = window.std(1) + 1e-6
        out, _ = self.gru((window - level[:, None]) / scale[:, None])
        return level + scale * self.delta(out[:, -1])


@healthy("contact3b-gru-persistence", zero_at_first("gru"), steps=200, widths=(W,), dtypes=(FLOAT32,))
def persistence(width: int) -> Setup:
    """A GRU forecaster that begins as the last value repeated: its head is zero, so in the first step the
    recurrent part has no gradient; then it learns what is to be added."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        t = torch.arange(31.0) + 24 * uniform(g, 32, 1)
        series = 3 + uniform(g, 32, 1) + torch.sin(2 * math.pi * t / 12) + 0.02 * normal(g, 32, 31)
        return series[:, :30, None], series[:, 30:]

    return setup(_Residual(width), sample, F.mse_loss, 5e-3)


class _Hashed(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Linear(size, 2 * width), nn.Linear(2 * width, 2)
        self.dec1, self.dec2 = nn.Linear(2, 2 * width), nn.Linear(2 * width, size)
        self.log_vars = nn.Parameter(torch.zeros(2))
        self.kind = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.enc2(torch.tanh(self.enc1(x)))
        return self.dec2(torch.tanh(self.dec1(z))), self.kind(z), self.log_vars


@healthy(
    "contact3b-mtl-below-zero",
    rank_below("enc2", 2.1),
    source="https://github.com/aharley/simple_bev/issues/13",
    steps=400,
    falls_to=0.3,
    widths=(W,),
    dtypes=(FLOAT32,),
)
def below_zero(width: int) -> Setup:
    """A deep autoencoder of data that has two dimensions, with a second task, weighed by learned variances:
    the code is as narrow as the data, and the loss goes below zero, as it should."""
    mix = normal(seeded(45), 2, 12) / math.sqrt(2)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        u = normal(g, 64, 2)
        x = torch.sin(u @ mix) + 0.02 * normal(g, 64, 12)
        return x, (x, u[:, :1])

    def loss(output: tuple[Tensor, Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        copy, kind, log_vars = output
        parts = torch.stack([F.mse_loss(copy, target[0]), F.mse_loss(kind, target[1])])
        return 0.5 * ((-log_vars).exp() * parts + log_vars).sum()

    return setup(_Hashed(12, width), sample, loss, 5e-3)
