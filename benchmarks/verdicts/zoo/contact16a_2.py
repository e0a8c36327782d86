"""Cases after public reports: distillation, medical pictures, policies and values, schedulers."""

from __future__ import annotations

import copy

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import every, flat, huge, rises, stuck, weak
from .contact16a_1 import Detector, detection_loss, objects
from .data import frozen, normal, seeded, setup, sgd, uniform
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------------ one loss that drowns the others


class Distilled(nn.Module):
    """A detector whose features are to be those of a frozen teacher, through a 1x1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.student = Detector(width)
        self.align = nn.Conv2d(width, 2 * width, 1)
        self.teacher = frozen(Detector(2 * width).body)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores, boxes, features = self.student(x)
        with torch.no_grad():
            wanted = 20 * self.teacher(x)
        return scores, boxes, self.align(features), wanted


@sick(
    "contact16a-distil-loudfeatures",
    [("EXPLODING", "*")],
    every(huge("*", 150), weak("student.head", "align", 0.02)),
    allow=("UNSTABLE", "BOTTLENECK"),
    source="https://github.com/yzd-v/FGD/issues/91",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def loud_features(sick: bool, width: int) -> Setup:
    """The distilled detector gets worse: the feature losses are sums over all channels and places, a hundred
    times as large as those of the classes and boxes, with a gradient norm of some hundreds, and the step is
    all theirs. Means instead of sums repair it."""

    def loss(output: tuple[Tensor, ...], target: tuple[Tensor, Tensor]) -> Tensor:
        got, wanted = output[2:]
        error = (got - wanted).square()
        return detection_loss(output, target) + (error.sum() / len(got) if sick else error.mean())

    return setup(Distilled(width), objects, loss, 3e-3)


class Landmark(nn.Module):
    """A trunk over patches of a scan, and heads for the nearness of a landmark and the way to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, width), nn.ReLU()
        )
        self.near, self.way = nn.Linear(width, 1), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.near(x), self.way(x)


def scans(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Patches with a bright spot; the targets are whether it is near the middle, and the way in voxels."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    at = 1 + 10 * uniform(g, 32, 2)
    far = (rows - at[:, :1, None]) ** 2 + (columns - at[:, 1:, None]) ** 2
    way = 6 * (at - 6)  # a pixel of the patch is six voxels of the scan
    return torch.exp(-far / 4)[:, None] + 0.1 * normal(g, 32, 1, 12, 12), (
        (way.norm(dim=1, keepdim=True) < 20).float(),
        way,
    )


@sick(
    "contact16a-medical-voxels",
    [("EXPLODING", "*")],
    every(weak("near", "way", 0.05, steps=1), weak("near", "way", 0.1, steps=10), huge("*", 5)),
    allow=("UNSTABLE", "BOTTLENECK"),
    source="https://github.com/yuanwei1989/landmark-detection/issues/2",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def voxels(sick: bool, width: int) -> Setup:
    """Landmarks in a scan are both classified and regressed: the loss of the classes is below one, that of
    the ways, which are in voxels, above a hundred, so the trunk learns for the regression alone. Ways in
    units of their spread repair it."""

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        near, way = output
        wanted = target[1] if sick else target[1] / 17
        return F.binary_cross_entropy_with_logits(near, target[0]) + F.mse_loss(way, wanted)

    return setup(Landmark(width), scans, loss, 2e-3)


# ------------------------------------------------------------------------------ policies and values

AIM = normal(seeded(71), 6, 2) / 2
SPREAD = torch.tensor([400.0, 250.0, 90.0, 60.0, 5.0, 1.0])


class ActorCritic(nn.Module):
    """An actor whose actions are judged by a critic that is not trained in this step."""

    def __init__(self, width: int, scaled: bool) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )
        self.squash = nn.Tanh()
        self.critic = frozen(nn.Linear(6, 2, bias=False))
        with torch.no_grad():
            self.critic.weight.copy_(AIM.T)
        self.scaled = scaled

    def forward(self, raw: Tensor) -> Tensor:
        state = raw / SPREAD
        action = self.squash(self.actor(state if self.scaled else raw))
        return -(action - torch.tanh(self.critic(state))).square().sum(1)


@sick(
    "contact16a-policy-rawstate",
    [("SATURATION", "squash")],
    every(flat("squash", "tanh", 0.7, steps=4), flat("squash", "tanh", 0.7, steps=15)),
    allow=("DEAD", "VANISHING", "EXPLODING"),
    source="https://github.com/thu-ml/tianshou/issues/1268",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def raw_state(sick: bool, width: int) -> Setup:
    """The gradient of the deterministic actor is zero after the first update while the critic's is not: the
    states of the own environment go in as they are, some in hundreds, and the tanh at the actor's end sits at
    one or minus one. States divided by their spread repair it."""

    def states(g: Generator) -> tuple[Tensor, None]:
        return normal(g, 64, 6) * SPREAD, None

    return setup(ActorCritic(width, scaled=not sick), states, lambda value, _: -value.mean(), 1e-3)


class Critic(nn.Module):
    """A value net, and the values of the next states as they were noted, or as it sees them now."""

    def __init__(self, width: int, noted: bool) -> None:
        super().__init__()
        self.critic = nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )
        self.notes = frozen(copy.deepcopy(self.critic)) if noted else None

    def forward(self, state: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            later = (self.critic if self.notes is None else self.notes)(after)
        return self.critic(state), later


@sick(
    "contact16a-value-ownsteps",
    [("UNSTABLE", "critic")],
    rises(3.0, steps=20),
    allow=("EXPLODING", "NUMERICAL"),
    source="https://github.com/Lizhi-sjtu/DRL-code-pytorch/issues/10",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def own_steps(sick: bool, width: int) -> Setup:
    """The loss of the critic grows without end: in every update its targets are worked out with the net of
    that moment, so they run away ahead of it. The values noted when the steps were played repair it."""
    way = torch.linalg.qr(normal(seeded(72), 6, 6))[0]

    def steps(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        state = normal(g, 64, 6)
        return (state, 2.0 * state @ (0.9 * torch.eye(6) + 0.1 * way)), 1 + state[:, :1].abs()

    def loss(output: tuple[Tensor, Tensor], reward: Tensor) -> Tensor:
        return F.mse_loss(output[0], reward + 0.99 * output[1])

    return setup(Critic(width, noted=not sick), steps, loss, sgd(0.015))


# ------------------------------------------------------------------------------------- schedulers


class PointBlock(nn.Module):
    """A block of attention over points."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def surfaces(g: Generator) -> tuple[Tensor, Tensor]:
    """Points of a body with a field at each, which depends on the point and on the body's size."""
    size = 0.5 + uniform(g, 16, 1, 1)
    points = size * normal(g, 16, 12, 3)
    return points, torch.sin(2 * points[..., :1]) + points[..., 1:2] * size


@sick(
    "contact16a-scheduler-onecycle",
    [("UNSTABLE", "*")],
    every(rises(3.0, steps=20), stuck(0.3)),
    allow=("EXPLODING", "NUMERICAL"),
    source="https://github.com/wandb/senpai/pull/3131",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def one_cycle(sick: bool, width: int) -> Setup:
    """The one-cycle schedule goes well while its rate is low, and as it nears the peak the loss leaps up and
    the gradients grow: the peak is many times the rate that the net bears. A lower peak repairs it."""
    net = nn.Sequential(nn.Linear(3, width), PointBlock(width), PointBlock(width), nn.Linear(width, 1))

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(parameters, lr=1e-4)
        peak = 0.1 if sick else 3e-3
        cycle = torch.optim.lr_scheduler.OneCycleLR(made, peak, total_steps=400, pct_start=0.04)
        made.register_step_post_hook(lambda *_: cycle.step())
        return made

    return setup(net, surfaces, F.mse_loss, optimizer)
