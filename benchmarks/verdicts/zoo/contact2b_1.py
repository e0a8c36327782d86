"""Models that public reports say do not train: privacy, state space, uncertainty, anomalies, curved space."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import fading, no_gradient, not_finite, rises
from .data import clusters, factors, normal, setup, sgd, uniform
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------------------------ differential privacy


class SampledLinear(nn.Linear):
    """A linear layer that keeps the gradient of every sample on its parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in) to (batch, out), and watch the gradient of the output."""
        out = super().forward(input)
        if out.requires_grad:
            seen = input.detach()
            out.register_hook(lambda grad: self._keep(seen, grad))
        return out

    def _keep(self, x: Tensor, grad: Tensor) -> None:
        per_sample = grad.detach() * len(grad)  # the loss is a mean over the batch
        self.weight.grad_sample = torch.einsum("bo,bi->boi", per_sample, x)  # type: ignore[attr-defined]
        self.bias.grad_sample = per_sample  # type: ignore[attr-defined]


class PrivateSGD(torch.optim.SGD):
    """Gradient descent on clipped gradients of single samples, with noise."""

    def __init__(self, params: Any, lr: float, clip: float, noise: float, on_mean: bool) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.clip, self.noise, self.on_mean = clip, noise, on_mean

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clip, sum, add the noise, and step."""
        params = [p for group in self.param_groups for p in group["params"]]
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in params]).norm(dim=0)
        factor = (self.clip / (norms + 1e-6)).clamp(max=1.0)
        for p in params:
            total = torch.einsum("b,b...->...", factor, p.grad_sample)
            std = self.noise * self.clip
            if self.on_mean:
                p.grad = total / len(factor) + std * torch.randn_like(p)
            else:
                p.grad = (total + std * torch.randn_like(p)) / len(factor)
        super().step()


class PrivateNet(nn.Module):
    """A small classifier of features."""

    def __init__(self, size: int, width: int, kinds: int) -> None:
        super().__init__()
        self.fc1 = SampledLinear(size, width)
        self.fc2 = SampledLinear(width, width)
        self.out = SampledLinear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, size)."""
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))


@sick(
    "contact2b-privacy-noise",
    [("UNSTABLE", "*")],
    rises(3.0, steps=20),
    allow=("EXPLODING", "SATURATION", "NUMERICAL"),
    source="https://github.com/pytorch/functorch/issues/467",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def privacy_noise(sick: bool, width: int) -> Setup:
    """Private training by hand: the noise that is meant for the sum of the clipped gradients of the samples
    is added to their mean, so every step is a random throw and the loss climbs. Repair: add it to the sum."""
    model = PrivateNet(16, width, 6)

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return PrivateSGD(params, lr=0.1, clip=1.0, noise=0.6, on_mean=sick)

    return setup(model, clusters(16, 6, number=64), F.cross_entropy, optimizer)


# ------------------------------------------------------------------------------ state-space model


class SelectiveBlock(nn.Module):
    """A selective state-space block whose scan is two running sums, with input-dependent steps."""

    def __init__(self, dim: int, state: int, rank: int, chunk: int) -> None:
        super().__init__()
        inner = 2 * dim
        self.norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.split, self.chunk = (rank, state, state), chunk
        step = torch.exp(torch.rand(inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt_proj.bias.data = step + torch.log(-torch.expm1(-step))  # softplus gives the step back

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, dim) to the same, with the residual."""
        u, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        dt, b, c = self.x_proj(u).split(self.split, dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        decay = dt.unsqueeze(-1) * -torch.exp(self.A_log)  # (batch, time, inner, state)
        drive = (dt * u).unsqueeze(-1) * b.unsqueeze(2)
        h = torch.zeros_like(drive[:, 0])
        outs = []
        for a_part, b_part in zip(decay.split(self.chunk, 1), drive.split(self.chunk, 1), strict=True):
            kept = a_part.cumsum(1).exp()
            states = kept * ((b_part / kept).cumsum(1) + h.unsqueeze(1))
            outs.append(states)
            h = states[:, -1]
        y = torch.einsum("btds,bts->btd", torch.cat(outs, 1), c) + self.D * u
        return x + self.out_proj(y * F.silu(z))


class StateSpaceClassifier(nn.Module):
    """Two blocks over a sequence, and a head on the mean."""

    def __init__(self, features: int, dim: int, kinds: int, chunk: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, dim)
        self.blocks = nn.ModuleList(SelectiveBlock(dim, 16, 2, chunk) for _ in range(2))
        self.head = nn.Linear(dim, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, time, features)."""
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


def tones(length: int, number: int = 8) -> Any:
    """Noisy waves whose frequency is the class, on four channels."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = torch.randint(0, 3, (number,), generator=g)
        speed = (0.1 + 0.3 * kind)[:, None, None]
        phase = 6.3 * uniform(g, number, 1, 4)
        wave = torch.sin(speed * torch.arange(length)[None, :, None] + phase)
        return wave + 0.3 * normal(g, number, length, 4), kind

    return sample


@sick(
    "contact2b-statespace-cumsum",
    [("NUMERICAL", "blocks")],
    not_finite(3),
    source="https://github.com/MzeroMiko/VMamba/issues/135",
    steps=60,
    widths=(8,),
    dtypes=(FLOAT32,),
)
def statespace_cumsum(sick: bool, width: int) -> Setup:
    """A selective scan written as a running sum divided by the running decay: over the whole sequence the
    decay underflows to zero, and zero over zero is NaN. Repair: carry the state over short chunks."""
    length = 160
    model = StateSpaceClassifier(4, width, 3, chunk=length if sick else 8)
    return setup(model, tones(length), F.cross_entropy, 5e-3)


# ------------------------------------------------------------------------------ evidential uncertainty


class EvidentialNet(nn.Module):
    """A classifier that returns the evidence for every class as a Dirichlet distribution."""

    def __init__(self, size: int, width: int, kinds: int, evidence: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, kinds)
        nn.init.constant_(self.fc3.bias, -0.5)  # begin with little evidence for anything
        self.evidence = evidence

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the concentrations, and the vacuity, of (batch, size)."""
        logits = self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))
        evidence = F.relu(logits) if self.evidence == "relu" else torch.exp(logits.clamp(-10, 10))
        alpha = evidence + 1
        return {"alpha": alpha, "vacuity": alpha.shape[-1] / alpha.sum(-1, keepdim=True)}


def dirichlet_kl(alpha: Tensor) -> Tensor:
    """Return the divergence of Dirichlet distributions from the uniform one, of shape (batch, 1)."""
    total = alpha.sum(-1, keepdim=True)
    norm = torch.lgamma(total) - torch.lgamma(alpha).sum(-1, keepdim=True) - math.lgamma(alpha.shape[-1])
    return norm + ((alpha - 1) * (torch.digamma(alpha) - torch.digamma(total))).sum(-1, keepdim=True)


def evidential_loss(output: dict[str, Tensor], kind: Tensor, regular: bool) -> Tensor:
    """Return the evidential log loss, with the penalty on evidence for wrong classes; `regular` adds a reward
    for right evidence, by the vacuity."""
    alpha = output["alpha"]
    target = F.one_hot(kind, alpha.shape[-1]).float()
    right = (alpha * target).sum(-1, keepdim=True)
    loss = torch.log(alpha.sum(-1, keepdim=True)) - torch.log(right)
    loss = loss + 0.1 * dirichlet_kl(target + (1 - target) * alpha)
    if regular:
        loss = loss - output["vacuity"].detach() * torch.log(right - 1 + 1e-12)
    return loss.mean()


@sick(
    "contact2b-evidential-relu",
    [("DEAD", "*")],
    no_gradient("*"),
    allow=("VANISHING", "SATURATION", "BOTTLENECK"),
    source="https://arxiv.org/abs/2306.11113",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def evidential_relu(sick: bool, width: int) -> Setup:
    """Evidential classification by ReLU evidence: a sample without evidence for any class has no gradient,
    and here all begin so. Repair: evidence by the exponential function, and a reward for right evidence."""
    model = EvidentialNet(16, width, 10, "relu" if sick else "exp")

    def loss(output: dict[str, Tensor], kind: Tensor) -> Tensor:
        return evidential_loss(output, kind, regular=not sick)

    return setup(model, clusters(16, 10, number=64, spread=0.5), loss, 3e-3)


# ------------------------------------------------------------------------------ anomaly detection


class Memory(nn.Module):
    """Addresses a memory of prototypes by similarity, and drops the weights below a threshold."""

    def __init__(self, slots: int, dim: int, shrink: float, cosine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(slots, dim) / math.sqrt(dim))
        self.shrink, self.cosine = shrink, cosine

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is read for (batch, dim), and the weights of shape (batch, slots)."""
        if self.cosine:
            match = F.normalize(z, dim=-1) @ F.normalize(self.weight, dim=-1).t()
        else:
            match = z @ self.weight.t()
        att = match.softmax(-1)
        att = F.relu(att - self.shrink) * att / ((att - self.shrink).abs() + 1e-12)
        att = F.normalize(att, p=1, dim=-1)
        return att @ self.weight, att


class MemoryAutoencoder(nn.Module):
    """An autoencoder that rebuilds its input from prototypes alone."""

    def __init__(self, size: int, width: int, dim: int, slots: int, cosine: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(size, width), nn.LeakyReLU(0.2), nn.Linear(width, dim), nn.LayerNorm(dim)
        )
        self.memory = Memory(slots, dim, 0.0025, cosine)
        self.decoder = nn.Sequential(nn.Linear(dim, width), nn.LeakyReLU(0.2), nn.Linear(width, size))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the reconstruction of (batch, size) and the addressing weights."""
        read, att = self.memory(self.encoder(x))
        return {"output": self.decoder(read), "att": att}


def memory_loss(output: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the error of the reconstruction, with a small reward for sparse addressing."""
    att = output["att"]
    entropy = -(att * torch.log(att + 1e-12)).sum(-1).mean()
    return F.mse_loss(output["output"], x) + 0.0002 * entropy


@sick(
    "contact2b-anomaly-memory",
    [("DEAD", "*")],
    no_gradient("encoder", "memory"),
    allow=("BOTTLENECK", "SATURATION", "VANISHING"),
    source="https://github.com/donggong1/memae-anomaly-detection/issues/12",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def anomaly_memory(sick: bool, width: int) -> Setup:
    """A memory autoencoder addressed by cosine similarity: no weight of the softmax over a thousand slots
    reaches the threshold, so all are cut to zero, and encoder and memory get no gradient. Repair: address
    by inner product, whose weights are uneven enough."""
    model = MemoryAutoencoder(24, width, 32, 1000, cosine=sick)
    return setup(model, factors(24, 3), memory_loss, 5e-3)


# ------------------------------------------------------------------------------ hyperbolic space


class RiemannianScale(torch.autograd.Function):
    """The identity; its gradient is scaled by the inverse metric of the ball."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the points."""
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Scale the gradient."""
        (x,) = ctx.saved_tensors
        return grad * (1 - x.square().sum(-1, keepdim=True)).square() / 4


class ToPoincare(nn.Module):
    """The exponential map at the origin of the ball, for features that may be clipped in norm."""

    def __init__(self, clip: float | None) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, u: Tensor) -> Tensor:
        """Map (batch, dim) into the ball."""
        norm = u.norm(dim=-1, keepdim=True).clamp_min(1e-5)
        if self.clip is not None:
            u = u * (self.clip / norm).clamp(max=1.0)
            norm = u.norm(dim=-1, keepdim=True).clamp_min(1e-5)
        x = torch.tanh(norm.clamp(max=15)) * u / norm
        size = x.norm(dim=-1, keepdim=True).clamp_min(1e-5)
        x = torch.where(size > 1 - 1e-3, x / size * (1 - 1e-3), x)
        return RiemannianScale.apply(x)


class HyperbolicPlanes(nn.Module):
    """Logits as signed distances to hyperplanes of the ball."""

    def __init__(self, dim: int, kinds: int) -> None:
        super().__init__()
        self.p = nn.Parameter(0.01 * torch.randn(kinds, dim))
        self.a = nn.Parameter(0.2 * torch.randn(kinds, dim) / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, dim)."""
        p, x = -torch.tanh(self.p)[None], x[:, None]
        px, pp, xx = ((v * w).sum(-1, keepdim=True) for v, w in ((p, x), (p, p), (x, x)))
        moved = ((1 + 2 * px + xx) * p + (1 - pp) * x) / (1 + 2 * px + pp * xx)
        a = self.a * (1 - pp[0])
        size = a.norm(dim=-1)
        gap = (1 - moved.square().sum(-1)).clamp_min(1e-5)
        return 2 / (1 - pp[..., 0]) * size * torch.asinh(2 * (moved * a).sum(-1) / (gap * size))


@sick(
    "contact2b-hyperbolic-boundary",
    [("VANISHING", "features")],
    fading("features.fc1", "features.ball", 1e-4),
    allow=("SATURATION", "UNSTABLE", "EXPLODING"),
    source="https://arxiv.org/abs/2107.11472",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def hyperbolic_boundary(sick: bool, width: int) -> Setup:
    """A hybrid hyperbolic classifier: large Euclidean features land on the rim of the ball, where the metric
    leaves their gradient a millionth. Repair: clip the features to norm one before the map."""
    features = nn.Sequential()
    features.add_module("fc1", nn.Linear(16, width))
    features.add_module("act1", nn.ReLU())
    features.add_module("fc2", nn.Linear(width, width, bias=False))
    features.add_module("bn", nn.BatchNorm1d(width))
    features.add_module("ball", ToPoincare(None if sick else 1.0))
    model = nn.Sequential()
    model.add_module("features", features)
    model.add_module("planes", HyperbolicPlanes(width, 5))
    return setup(model, clusters(16, 5, number=64, spread=1.5), F.cross_entropy, sgd(0.004, 0.9))
