"""Cases re-created from public reports: kernels, neural fields, detectors, quantisation, own losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import every, huge, no_gradient, not_finite, stuck, training
from .data import choice, normal, seeded, setup, sgd, textures, uniform
from .registry import FLOAT32, Setup, sick

W = 32


# ------------------------------------------------------------------------------- a Gaussian process


class _Rbf(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.raw_lengthscale = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x / F.softplus(self.raw_lengthscale)
        return torch.exp(-0.5 * (x[:, None] - x[None]).square().sum(-1))


class _Scaled(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.raw_outputscale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.raw_outputscale) * self.base(x)


class _Gp(nn.Module):
    def __init__(self, size: int, normalise: bool) -> None:
        super().__init__()
        self.normalise = normalise
        self.mean = nn.Parameter(torch.zeros(()))
        self.covar = _Scaled(_Rbf(size))
        self.raw_noise = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalise:
            x = (x - x.mean(0)) / x.std(0)
        noise = F.softplus(self.raw_noise) + 1e-4
        return self.mean.expand(len(x)), self.covar(x) + noise * torch.eye(len(x))


@sick(
    "contact3b-gp-lengthscale",
    expect=[("DEAD", "covar.base")],
    allow=["VANISHING", "SATURATION", "BOTTLENECK"],
    claim=no_gradient("covar.base", after=20),
    source="https://github.com/cornellius-gp/gpytorch/issues/1359",
    steps=150,
    widths=(W,),
    dtypes=(FLOAT32,),
)
def gp(sick: bool, width: int) -> Setup:
    """Exact GP regression on inputs in metres, with a lengthscale that begins below one: every entry of the
    kernel off the diagonal underflows, and the lengthscale gets no gradient. Repaired by scaled inputs."""
    g0 = seeded(31)
    x = 1000 * uniform(g0, 2 * width, 2)
    y = torch.sin(x[:, 0] / 150) + torch.cos(x[:, 1] / 200) + 0.1 * normal(g0, 2 * width)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        mean, cov = output
        chol = torch.linalg.cholesky(cov)
        white = torch.linalg.solve_triangular(chol, (target - mean)[:, None], upper=False)
        half = 0.5 * white.square().sum() + chol.diagonal().log().sum()
        return half / len(target) + 0.5 * math.log(2 * math.pi)

    return setup(_Gp(2, normalise=not sick), lambda g: (x, y), loss, 0.05)


# ---------------------------------------------------------------------------------- a neural field


class _Sine(nn.Module):
    def __init__(self, inputs: int, outputs: int, first: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / 30
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * self.linear(x))


class _Siren(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Sine(2, width, first=True), _Sine(width, width), _Sine(width, width)])
        self.out = nn.Linear(width, 1)

    def forward(self, coords: Tensor) -> Tensor:
        for layer in self.layers:
            coords = layer(coords)
        return self.out(coords)


def _mounts(setup: Setup) -> tuple[bool, str]:
    """Within some steps the gradient's norm mounts to many times what it was at first."""
    norms = [step.norm("*") for step in training(setup, 25)]
    ratio = max(norms) / norms[0]
    return not ratio < 10, f"largest gradient / first = {ratio:.2g}"


@sick(
    "contact3b-field-pixels",
    expect=[("UNSTABLE", "*")],
    allow=["EXPLODING", "SATURATION", "NUMERICAL", "BOTTLENECK"],
    claim=every(_mounts, stuck(0.2)),
    source="https://github.com/vsitzmann/siren/issues/19",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def siren(sick: bool, width: int) -> Setup:
    """A sine network of a picture is fed pixel numbers: times the frequency of 30 they make every step turn
    the phases by radians, and the loss never settles. Repaired by inputs in [-1, 1] and a smaller rate."""
    side = 64

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        pixel = choice(g, side, 256, 2).float()
        unit = 2 * pixel / (side - 1) - 1
        value = torch.sin(4 * unit[:, :1]) * torch.cos(3 * unit[:, 1:]) + 0.5 * unit[:, :1]
        return (pixel if sick else unit), value

    return setup(_Siren(width), sample, F.mse_loss, sgd(1e-2 if sick else 1e-3, momentum=0.9))


# -------------------------------------------------------------------------------------- a detector


class _Detector(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width // 2, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.cls = nn.Linear(width * 16, 1)
        self.box = nn.Linear(width * 16, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.conv2(F.relu(self.conv1(image)))).flatten(1)
        box = self.box(h)
        half = 0.5 * box[:, 2:].exp()
        corners = torch.cat([box[:, :2] - half, box[:, :2] + half], dim=1)
        return {"score": self.cls(h), "box": corners}


def _overlap(a: Tensor, b: Tensor, generalised: bool) -> Tensor:
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner
    iou = inner / union
    if not generalised:
        return iou
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    return iou - (hull - union) / hull


@sick(
    "contact3b-detect-disjoint",
    expect=[("DEAD", "box")],
    allow=["VANISHING", "SATURATION"],
    claim=no_gradient("box", after=12),
    source="https://github.com/lilanxiao/Rotated_IoU/issues/9",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def boxes(sick: bool, width: int) -> Setup:
    """Boxes in pixels are trained by 1 - IoU; at first they lie in the corner and touch no target, so the
    box head gets no gradient while the classifier learns. Repaired by the generalised IoU."""
    grid = torch.arange(16.0) + 0.5

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        centre, half = 7 + 4 * uniform(g, 32, 2), 1.5 + 2 * uniform(g, 32, 2)
        inside = ((grid - centre[..., None]).abs() < half[..., None]).float()
        kind = choice(g, 2, 32, 1).float()
        image = inside[:, 1, :, None] * inside[:, 0, None, :] * (2 * kind - 1)[..., None]
        image = image + 0.1 * normal(g, 32, 16, 16)
        return image[:, None], (kind, torch.cat([centre - half, centre + half], dim=1))

    def loss(output: dict[str, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        kind, box = target
        found = _overlap(output["box"], box, generalised=not sick)
        return F.binary_cross_entropy_with_logits(output["score"], kind) + (1 - found).mean()

    return setup(_Detector(width), sample, loss, 2e-3)


# ------------------------------------------------------------------------------ learned quantisation


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    return (x - x * scale).detach() + x * scale


def _round_pass(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


class _Lsq(nn.Module):
    def __init__(self, weight: Tensor, bits: int, eps: float) -> None:
        super().__init__()
        self.low, self.high, self.eps = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, eps
        size = weight.detach().abs().flatten(1).mean(1).reshape(-1, *[1] * (weight.dim() - 1))
        self.step = nn.Parameter(2 * size / math.sqrt(self.high))

    def forward(self, x: Tensor) -> Tensor:
        step = _scale_gradient(self.step, 1 / math.sqrt(self.high * x.numel()))
        if self.eps:
            step = step.clamp(min=self.eps)
        return _round_pass((x / step).clamp(self.low, self.high)) * step


class _QuantConv(nn.Conv2d):
    def quantise(self, bits: int, eps: float) -> None:
        self.quan_w = _Lsq(self.weight, bits, eps)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quan_w(self.weight), self.bias)


class _QuantNet(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.conv1 = _QuantConv(3, width, 3, padding=1)
        self.conv2 = _QuantConv(width, width, 3, padding=1, stride=2)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 4)
        with torch.no_grad():  # the float model came pruned, by whole filters
            self.conv2.weight[::8] = 0
        self.conv1.quantise(4, eps)
        self.conv2.quantise(4, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.fc(F.relu(self.bn(self.conv2(x))).mean((2, 3)))


@sick(
    "contact3b-lsq-pruned",
    expect=[("NUMERICAL", "conv2")],
    allow=["DEAD", "UNSTABLE", "EXPLODING"],
    claim=not_finite(1, loss=True),
    source="https://github.com/zhutmost/lsq-net/issues/17",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def lsq(sick: bool, width: int) -> Setup:
    """Learned step sizes begin at the mean size of each filter's weights: a filter that was pruned to zero
    gets a step of zero, and is divided by it. Repaired by a least step."""
    return setup(_QuantNet(width, 0.0 if sick else 1e-5), textures(), F.cross_entropy, 3e-3)


# ------------------------------------------------------------------------------------ a focal loss


class _Defects(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, width, 3, padding=1)
        self.mid = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.head = nn.Conv2d(2 * width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        skip = h = F.relu(self.down(image))
        for conv in self.mid:
            h = F.relu(conv(h))
        return self.head(torch.cat([h, skip], dim=1))


def _focal(eps_in_power: float, gamma: float = 0.5, alpha: float = 0.75) -> Callable[[Any, Any], Tensor]:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        on = -alpha * torch.pow(1 - p + eps_in_power, gamma) * target * torch.log(p + 1e-8)
        off = -(1 - alpha) * torch.pow(p + eps_in_power, gamma) * (1 - target) * torch.log(1 - p + 1e-8)
        return (on + off).mean()

    return loss


@sick(
    "contact3b-focal-root",
    expect=[("NUMERICAL", "*")],
    allow=["SATURATION", "UNSTABLE", "EXPLODING", "DEAD"],
    claim=not_finite(2, loss=False),
    source="https://github.com/kornia/kornia/issues/918",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def focal(sick: bool, width: int) -> Setup:
    """Rare defects in pictures of 0 to 255 are segmented with a focal loss of gamma 0.5: where a probability
    is exactly one, the power's slope is infinite times zero, and the gradients are NaN though the loss is
    not. Repaired by an epsilon in the power."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        mask = (uniform(g, 8, 1, 12, 12) < 0.03).float()
        return 90 + 25 * normal(g, 8, 1, 12, 12) + 140 * mask, mask

    return setup(_Defects(width), sample, _focal(0.0 if sick else 1e-8), 1e-3)


# ---------------------------------------------------------------------------------- a forecaster


class _Forecaster(nn.Module):
    def __init__(self, width: int, horizon: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, num_layers=2, batch_first=True)
        self.fc = nn.Linear(width, horizon)

    def forward(self, window: Tensor) -> Tensor:
        out, _ = self.lstm(window)
        return self.fc(out[:, -1])


@sick(
    "contact3b-lstm-mape",
    expect=[("EXPLODING", "*")],
    allow=["UNSTABLE", "NUMERICAL"],
    claim=huge("*", 1e4),
    source="https://github.com/timeseriesAI/tsai/issues/524",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def mape(sick: bool, width: int) -> Setup:
    """A forecaster of a series around zero is trained by a percentage error whose denominator is clamped
    from below at 1e-8, negative targets and all: the error is divided by 1e-8. Repaired by the target's
    absolute value."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        t = torch.arange(28.0) + 24 * uniform(g, 32, 1)
        wave = torch.sin(2 * math.pi * t / 12)
        series = wave.sign() * (0.6 + 0.6 * wave.abs()) + 0.05 * normal(g, 32, 28)
        return series[:, :24, None], series[:, 24:]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        size = target if sick else target.abs()
        return ((output - target).abs() / size.clamp_min(1e-8)).mean()

    return setup(_Forecaster(width, 4), sample, loss, 5e-3)
