"""First contact, round 2a, part 3: cases from public reports on normalising flows and control.

Every sick case re-creates, in a small model, the structure and the mechanism of the report that it names; the
repair is the one of its thread, or what its field settled on. They were written without seeing any verdict.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import huge, jumps, not_finite, zero_at_first
from .data import normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick

# -------------------------------------------------------------------------------- normalising flows


def _knots(raw: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return the widths of bins over [-bound, bound], and the bins' edges."""
    share = 0.01 + (1 - 0.01 * raw.shape[-1]) * F.softmax(raw, -1)
    edges = F.pad(torch.cumsum(share, -1), (1, 0)) * 2 * bound - bound
    return share * 2 * bound, edges


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[..., None]).squeeze(-1)


def _spline_inverse(
    y: Tensor, raw: Tensor, bins: int, bound: float, *, keep_in: bool
) -> tuple[Tensor, Tensor]:
    """Invert a monotonic rational-quadratic spline with identity tails; returns (x, log |dx/dy|)."""
    inside = (y >= -bound) & (y <= bound)
    at = y.clamp(-bound, bound) if keep_in else y
    widths, xs = _knots(raw[..., :bins], bound)
    heights, ys = _knots(raw[..., bins : 2 * bins], bound)
    slopes = F.pad(F.softplus(raw[..., 2 * bins :] + 0.54), (1, 1), value=1.0)
    k = torch.searchsorted(ys, at[..., None].detach().contiguous(), right=True).squeeze(-1) - 1
    k = k.clamp(0, bins - 1)
    w, h, x0, y0 = _pick(widths, k), _pick(heights, k), _pick(xs, k), _pick(ys, k)
    d0, d1, s = _pick(slopes, k), _pick(slopes, k + 1), _pick(heights, k) / _pick(widths, k)
    rise = at - y0
    a = h * (s - d0) + rise * (d1 + d0 - 2 * s)
    b = h * d0 - rise * (d1 + d0 - 2 * s)
    c = -s * rise
    xi = 2 * c / (-b - torch.sqrt(b.square() - 4 * a * c))
    below = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
    slope = s.square() * (d1 * xi.square() + 2 * s * xi * (1 - xi) + d0 * (1 - xi).square()) / below.square()
    return torch.where(inside, x0 + xi * w, y), torch.where(inside, -torch.log(slope), torch.zeros_like(y))


class _SplineCoupling(nn.Module):
    """A coupling: the first half tells the spline that the second half passes back through."""

    def __init__(self, size: int, width: int, bins: int, *, keep_in: bool):
        super().__init__()
        self.first, self.bins, self.keep_in = size // 2, bins, keep_in
        self.conditioner = nn.Sequential(
            nn.Linear(self.first, width), nn.ReLU(), nn.Linear(width, (size - self.first) * (3 * bins - 1))
        )

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        known, other = y[:, : self.first], y[:, self.first :]
        raw = self.conditioner(known).view(len(y), other.shape[1], -1)
        x, log_slope = _spline_inverse(other, raw, self.bins, 3.0, keep_in=self.keep_in)
        return torch.cat([x, known], 1), log_slope.sum(1)


class _SplineFlow(nn.Module):
    """Couplings from data to a normal base; returns the log-density."""

    def __init__(self, size: int, width: int, *, keep_in: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(size))
        self.couplings = nn.ModuleList(_SplineCoupling(size, width, 6, keep_in=keep_in) for _ in range(3))

    def forward(self, y: Tensor) -> Tensor:
        z, log_slope = y * self.scale.exp(), self.scale.sum()
        for coupling in self.couplings:
            z, more = coupling(z)
            log_slope = log_slope + more
        return log_slope - 0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def _mean_surprise(log_density: Tensor, _: Tensor) -> Tensor:
    return -log_density.mean()


@sick(
    "contact2a-flow-spline_outside_its_box",
    [("NUMERICAL", "*")],
    not_finite(4, loss=False),
    source="https://github.com/danielward27/flowjax/issues/239",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def spline_outside_its_box(sick: bool, width: int) -> Setup:
    """A neural spline flow inverts its splines outside their box too, and only then chooses the identity
    there: the root of a negative number is not used, but its gradient is. Repaired by clipping to the box."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        core, wide = normal(g, 64, 4), 0.4 + 2.2 * uniform(g, 64, 1).square()
        twisted = torch.stack([core[:, 0], core[:, 0] + 0.3 * core[:, 1], core[:, 2], core[:, 2] ** 2], 1)
        return wide * twisted + 0.05 * core, core

    return setup(_SplineFlow(4, width, keep_in=not sick), sample, _mean_surprise, 5e-3)


class _AffineFlow(nn.Module):
    """Couplings whose last layers start at zero, so that the flow starts as the identity."""

    def __init__(self, size: int, width: int, depth: int):
        super().__init__()
        self.first = size // 2
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(self.first, width), nn.ReLU(), nn.Linear(width, 2 * self.first))
            for _ in range(depth)
        )
        for name, parameter in self.nets.named_parameters():
            if ".2." in name:
                nn.init.zeros_(parameter)
        self.bound = nn.Parameter(torch.ones(depth, self.first))

    def forward(self, x: Tensor) -> Tensor:
        log_slope = x.new_zeros(len(x))
        one, two = x[:, : self.first], x[:, self.first :]
        for net, bound in zip(self.nets, self.bound, strict=True):
            shift, scale = net(one).chunk(2, 1)
            scale = bound * torch.tanh(scale)
            two = two * scale.exp() + shift
            log_slope, one, two = log_slope + scale.sum(1), two, one
        return log_slope - 0.5 * (one.square() + two.square()).sum(1) - self.first * math.log(2 * math.pi)


@healthy(
    "contact2a-flow-starts_as_identity",
    zero_at_first("nets.0.0", "nets.5.0", "bound"),
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def starts_as_identity(width: int) -> Setup:
    """A flow of affine couplings whose last layers start at zero: the layers before them and the bounds of
    the scales have no gradient in the first step, and the loss, a surprise in nats, falls all the same."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        turn = 2 * math.pi * uniform(g, 64, 1)
        ring = torch.cat([turn.cos(), turn.sin(), (2 * turn).cos(), (2 * turn).sin()], 1)
        return ring + 0.1 * normal(g, 64, 4), turn

    return setup(_AffineFlow(4, width, 6), sample, _mean_surprise, 3e-3)


class _Posterior(nn.Module):
    """Affine couplings from parameters to a normal base, all of them told what was observed."""

    def __init__(self, size: int, seen: int, width: int, depth: int, clamp: float | None):
        super().__init__()
        self.first, self.clamp = size // 2, clamp
        self.nets = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(self.first + seen, width), nn.ELU()),
                *(nn.Linear(width, width), nn.ELU(), nn.Linear(width, 2 * self.first)),
            )
            for _ in range(depth)
        )

    def forward(self, theta: Tensor, seen: Tensor) -> dict[str, Tensor]:
        one, two = theta.chunk(2, 1)
        log_slope = theta.new_zeros(len(theta))
        for net in self.nets:
            shift, scale = net(torch.cat([one, seen], 1)).chunk(2, 1)
            if self.clamp is not None:
                scale = 2 * self.clamp / math.pi * torch.atan(scale / self.clamp)
            log_slope = log_slope + scale.sum(1)
            one, two = scale.exp() * two + shift, one
        return {"z": torch.cat([one, two], 1), "log_slope": log_slope}


@sick(
    "contact2a-flow-unbounded_scales",
    [("UNSTABLE", "*")],
    jumps(80.0, steps=40),
    allow=("EXPLODING", "NUMERICAL"),
    source="https://github.com/bayesflow-org/bayesflow/issues/23",
    steps=150,
    widths=(48,),
    dtypes=(FLOAT32,),
)
def unbounded_scales(sick: bool, width: int) -> Setup:
    """A flow learns the posterior of a simulator whose output is now and then far out; the exponentials of
    its log-scales multiply, and one batch throws loss and gradient up. Repaired by a soft bound on them."""
    mix = normal(seeded(34), 4, 6) / 2

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        theta = normal(g, 64, 4)
        seen = theta @ mix + 0.3 * normal(g, 64, 6)
        return (theta, torch.where(uniform(g, 64, 1) < 0.02, 8 * seen, seen)), theta

    def loss(out: dict[str, Tensor], _: Tensor) -> Tensor:
        return (0.5 * out["z"].square().sum(1) - out["log_slope"]).mean()

    return setup(_Posterior(4, 6, width, 5, None if sick else 1.0), sample, loss, 3e-3)


# ------------------------------------------------------------------------------------------ control


class _Controlled(nn.Module):
    """A policy that pushes a puck among round, stiff bumpers in a simulation; returns the costs in time."""

    def __init__(self, width: int, steps: int, truncation: int | None):
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2))
        self.steps, self.truncation = steps, truncation

    def _contact(self, place: Tensor) -> Tensor:
        offset = place - 2 * (place / 2).round().detach()
        gap = offset.square().sum(1, keepdim=True).add(1e-6).sqrt()
        return 300.0 * F.relu(0.6 - gap) * offset / gap

    def forward(self, place: Tensor, speed: Tensor) -> Tensor:
        costs = []
        for t in range(self.steps):
            if self.truncation and t % self.truncation == 0:
                place, speed = place.detach(), speed.detach()
            seen = torch.cat([(math.pi * place).sin(), (math.pi * place).cos(), speed], 1)
            push = 2 * torch.tanh(self.policy(seen))
            speed = speed + 0.05 * (push + self._contact(place))
            place = place + 0.05 * speed
            costs.append(speed.square().sum(1))
        return torch.stack(costs, 1)


@sick(
    "contact2a-control-long_horizon",
    [("EXPLODING", "*")],
    huge("policy", 1e4),
    allow=("UNSTABLE", "NUMERICAL"),
    source="https://github.com/google/brax/issues/186",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def long_horizon(sick: bool, width: int) -> Setup:
    """A policy learns to brake a puck from the gradient of a long simulation with stiff contacts, each of
    which scatters: the gradient grows with every one. Repaired by cutting the graph every ten steps."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        turn = 2 * math.pi * uniform(g, 16, 1)
        return (1 + 0.3 * normal(g, 16, 2), 3 * torch.cat([turn.cos(), turn.sin()], 1)), turn

    model = _Controlled(width, 80, None if sick else 10)
    return setup(model, sample, lambda costs, _: costs.mean(), 5e-3)
