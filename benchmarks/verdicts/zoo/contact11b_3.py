"""Reports on physics, few-shot learning, uncertain boxes and latent spaces."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .claims import Claim, flat, huge, no_gradient, training
from .data import Sample, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------------------------------------ physics


class NavierStokes(nn.Module):
    """A network of place that returns stream function and pressure; its outputs are flow and residuals."""

    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.net = stack(
            fc1=nn.Linear(2, width),
            act1=act(),
            fc2=nn.Linear(width, width),
            act2=act(),
            fc3=nn.Linear(width, width),
            act3=act(),
            out=nn.Linear(width, 2, bias=False),
        )

    def forward(self, place: Tensor) -> Tensor:
        """Return the two velocities and the two residuals of steady flow at each place."""
        place = place.requires_grad_()

        def slope(y: Tensor) -> Tensor:
            grads = torch.autograd.grad(y.sum(), place, create_graph=True, materialize_grads=True)
            return grads[0]

        psi, p = self.net(place).unbind(-1)
        psi_x, psi_y = slope(psi).unbind(-1)
        u, v, dp = psi_y, -psi_x, slope(p)
        du, dv = slope(u), slope(v)
        lap_u = slope(du[:, 0])[:, 0] + slope(du[:, 1])[:, 1]
        lap_v = slope(dv[:, 0])[:, 0] + slope(dv[:, 1])[:, 1]
        f = u * du[:, 0] + v * du[:, 1] + dp[:, 0] - 0.1 * lap_u
        g = u * dv[:, 0] + v * dv[:, 1] + dp[:, 1] - 0.1 * lap_v
        return torch.stack([u, v, f, g], -1)


def vortices(number: int = 128) -> Sample:
    """Places in a square with the velocities of a lattice of decaying vortices and its forcing."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        place = 3 * uniform(g, number, 2)
        x, y = place.unbind(-1)
        u, v = -x.cos() * y.sin(), x.sin() * y.cos()
        return place, torch.stack([u, v, 0.2 * u, 0.2 * v], -1)

    return sample


@sick(
    "contact11b-pinn-relu",
    [("DEAD", "*")],
    no_gradient("net.fc1.bias", "net.fc2.bias", "net.fc3.bias"),
    source="https://github.com/ComputationalDomain/PINNs/issues/1",
    steps=300,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def pinn_relu(sick: bool, width: int) -> Setup:
    """Flow and residuals are derivatives of a network of rectifiers, whose second derivatives are zero: the
    velocities are steps, viscosity drops out, and no bias gets a gradient; the repair keeps tanh."""
    return setup(NavierStokes(width, nn.ReLU if sick else nn.Tanh), vortices(), F.mse_loss, 5e-3)


# ----------------------------------------------------------------------------------------- few shot


class ProtoNet(nn.Module):
    """A convolutional embedding, and logits that are distances to the means of the support."""

    def __init__(self, width: int, ways: int, factor: float) -> None:
        super().__init__()
        self.encoder = stack(
            conv1=nn.Conv2d(3, width, 3, padding=1),
            bn1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(width, 2 * width, 3, padding=1),
            bn2=nn.BatchNorm2d(2 * width),
            flat=nn.Flatten(),
        )
        self.logits = nn.Identity()
        self.ways, self.factor = ways, factor

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        """Return the logits of the queries."""
        shots = len(support) // self.ways
        h = self.encoder(torch.cat([support, query]))
        prototypes = h[: len(support)].view(self.ways, shots, -1).mean(1)
        away = (h[len(support) :, None] - prototypes).square().sum(-1)
        return self.logits(-away * self.factor)


def episodes(ways: int = 5, shots: int = 2, queries: int = 6) -> Sample:
    """Episodes of classes of stripes drawn anew each time."""
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        wave, colour = normal(g, ways, 1, 2), normal(g, ways, 1, 3, 1, 1)
        phase = wave[..., 0, None, None] * rows + wave[..., 1, None, None] * columns
        phase = phase + 6.3 * uniform(g, ways, shots + queries, 1, 1)
        picture = (
            torch.sin(phase)[:, :, None] + 0.4 * colour + 0.7 * normal(g, ways, shots + queries, 3, 8, 8)
        )
        support, query = picture[:, :shots].flatten(0, 1), picture[:, shots:].flatten(0, 1)
        return (support, query), torch.arange(ways).repeat_interleave(queries)

    return sample


@sick(
    "contact11b-protonet-scale",
    [("SATURATION", "*")],
    flat("logits", "softmax of", 0.9),
    allow=("UNSTABLE", "EXPLODING"),
    source="https://github.com/RL-VIG/LibFewShot/issues/49",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def protonet_scale(sick: bool, width: int) -> Setup:
    """Squared distances over a thousand features are hundreds apart, so the softmax is one-hot from the
    start, right or wrong; the repair multiplies the distances by 0.01."""
    return setup(ProtoNet(width, 5, 1.0 if sick else 0.01), episodes(), F.cross_entropy, 2e-3)


# ----------------------------------------------------------------------------- meta-learning of sines


class MetaSine(nn.Module):
    """A regression network that is adapted to the support by descent before it sees the queries."""

    def __init__(self, width: int, limit: float) -> None:
        super().__init__()
        self.net = stack(
            fc1=nn.Linear(1, width),
            relu1=nn.ReLU(),
            fc2=nn.Linear(width, width),
            relu2=nn.ReLU(),
            fc3=nn.Linear(width, 1),
        )
        self.limit = limit

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        """Return the outputs for the queries of each task."""
        outputs = []
        for i in range(len(x)):
            w = dict(self.net.named_parameters())
            for _ in range(5):
                inner = F.mse_loss(functional_call(self.net, w, (x[i],)), y[i])
                grads = torch.autograd.grad(inner, list(w.values()), create_graph=True)
                norm = torch.stack([g.square().sum() for g in grads]).sum().add(1e-12).sqrt()
                factor = (self.limit / norm.detach()).clamp(max=1.0)
                w = {n: a - 0.02 * factor * g for (n, a), g in zip(w.items(), grads, strict=True)}
            outputs.append(functional_call(self.net, w, (query[i],)))
        return torch.stack(outputs)


def sines(tasks: int = 4, shots: int = 8) -> Sample:
    """Tasks of one sine each with its own size and phase; targets are in large units."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        size, phase = 10 + 30 * uniform(g, tasks, 1, 1), 0.6 * uniform(g, tasks, 1, 1)
        x, query = 6 * uniform(g, tasks, shots, 1) - 3, 6 * uniform(g, tasks, shots, 1) - 3
        return (x, size * torch.sin(x + phase), query), size * torch.sin(query + phase)

    return sample


def leaves(limit: float, steps: int = 4) -> Claim:
    """In the first steps some gradient norm is above a limit or not finite."""

    def claim(setup: Setup) -> tuple[bool, str]:
        worst = max(
            (n if math.isfinite(n) else math.inf) for n in (s.norm("*") for s in training(setup, steps))
        )
        return not worst < limit, f"largest gradient norm = {worst:.2g}"

    return claim


@sick(
    "contact11b-maml-clip",
    [("EXPLODING", "*")],
    leaves(1e7),
    allow=("NUMERICAL", "UNSTABLE"),
    source="https://github.com/cnguyen10/few_shot_meta_learning/issues/12",
    steps=150,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def maml_clip(sick: bool, width: int) -> Setup:
    """The loss of a regression task is large at first, so the steps of the inner loop overshoot more each
    time and the gradient through them explodes; the repair clips the gradient of the inner loop."""
    return setup(MetaSine(width, math.inf if sick else 5.0), sines(), F.mse_loss, 1e-2)


# ---------------------------------------------------------------------------------- uncertain boxes


class BoxHead(nn.Module):
    """A head of boxes that returns offsets and the logarithm of their precision."""

    def __init__(self, width: int, spread: float) -> None:
        super().__init__()
        self.backbone = stack(
            conv=nn.Conv2d(1, width, 3, stride=2, padding=1),
            relu1=nn.ReLU(),
            flat=nn.Flatten(),
            fc=nn.Linear(width * 36, 2 * width),
            relu2=nn.ReLU(),
        )
        self.bbox_pred, self.bbox_std = nn.Linear(2 * width, 4), nn.Linear(2 * width, 4)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.normal_(self.bbox_std.weight, std=spread)
        nn.init.zeros_(self.bbox_std.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return offsets and logarithms of variance."""
        h = self.backbone(x)
        return self.bbox_pred(h), self.bbox_std(h)


def boxes(number: int = 16, size: int = 12) -> Sample:
    """Pictures of many grey levels with a bright box; the target is its place and size, scaled."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        spot, half = 3 + 6 * uniform(g, number, 2), 1 + 3 * uniform(g, number, 2)
        grid = torch.arange(size).float()
        inside = (grid - spot[..., None]).abs() < half[..., None]
        mask = inside[:, 0, :, None] & inside[:, 1, None, :]
        picture = 64.0 * mask[:, None] - 32 + 10 * normal(g, number, 1, size, size)
        return picture, torch.cat([spot / 3 - 2, half - 2], 1)

    return sample


@sick(
    "contact11b-klloss-alpha",
    [("EXPLODING", "*")],
    huge("bbox_std", 1e5),
    allow=("UNSTABLE", "NUMERICAL"),
    source="https://github.com/ethanhe42/KL-Loss/issues/4",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def klloss_alpha(sick: bool, width: int) -> Setup:
    """The loss of a box is divided by a predicted variance whose logarithm starts far from zero, so that
    tiny variances meet large errors and the loss is astronomical; the repair starts that layer near zero."""

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        offset, alpha = output
        return (
            torch.exp(-alpha) * F.smooth_l1_loss(offset, target, reduction="none") + 0.5 * alpha + 2
        ).mean()

    return setup(BoxHead(width, 0.2 if sick else 1e-4), boxes(), loss, 1e-3)


# ------------------------------------------------------------------------------------ latent spaces


class CollectiveVariables(nn.Module):
    """A variational autoencoder of molecular features with two latent variables."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.encoder = stack(
            fc1=nn.Linear(features, width), act1=nn.Tanh(), fc2=nn.Linear(width, width), act2=nn.Tanh()
        )
        self.mean_nn, self.log_var_nn = nn.Linear(width, 2), nn.Linear(width, 2)
        self.decoder = stack(fc1=nn.Linear(2, width), act1=nn.Tanh(), fc2=nn.Linear(width, features))
        self.noise = seeded(5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstruction, mean and logarithm of variance."""
        h = self.encoder(x)
        mean, log_var = self.mean_nn(h), self.log_var_nn(h)
        z = mean + torch.exp(0.5 * log_var) * torch.randn(mean.shape, generator=self.noise)
        return self.decoder(z), mean, log_var


def states(features: int = 24, number: int = 64) -> Sample:
    """Features of molecules in one of three states; the target is the input."""
    middles = normal(seeded(37), 3, features)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = torch.randint(0, 3, (number,), generator=g)
        x = 0.5 * middles[kind] + 0.1 * normal(g, number, features)
        return x, x

    return sample


def shrunken(module: str, below: float, steps: int = 20) -> Claim:
    """After some steps a module's outputs differ between samples by less than a number."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps, (module,))
        spread = float(last.outputs[module].detach().std(0).mean())
        return spread < below, f"spread of {module} over samples = {spread:.2g}"

    return claim


@sick(
    "contact11b-vaecv-beta",
    [("BOTTLENECK", "*")],
    shrunken("mean_nn", 0.1),
    allow=("VANISHING", "DEAD"),
    source="https://github.com/luigibonati/mlcolvar/pull/188",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def vaecv_beta(sick: bool, width: int) -> Setup:
    """The divergence from the prior outweighs the mean squared error, so that all samples get the same
    latent distribution and the decoder returns their mean; the repair weights the divergence by 0.001."""
    beta = 1.0 if sick else 0.001

    def loss(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        again, mean, log_var = output
        divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(-1).mean()
        return F.mse_loss(again, x) + beta * divergence

    return setup(CollectiveVariables(width, 24), states(), loss, 1e-2)
