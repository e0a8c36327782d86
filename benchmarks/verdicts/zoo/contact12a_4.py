"""Cases from public reports: polynomial edges, frames; flows, sums and frozen gates that are healthy."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, huge, no_gradient, stuck, training
from .data import discs, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, healthy, sick


def below_zero(steps: int) -> Claim:
    """The loss is negative after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps)
        return last.loss < 0, f"loss after {steps} steps = {last.loss:.3g}"

    return claim


def still(module: str, below: float, *, steps: int) -> Claim:
    """After some steps the spread of a module's outputs among the samples is below a number."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        spread = float(last.outputs[module].detach().double().std(0).max())
        return spread < below, f"spread of {module} after {steps} steps = {spread:.2g}"

    return claim


# -------------------------------------------------------- Kolmogorov-Arnold with a recurrence of polynomials


class PolynomialLayer(nn.Module):
    """Each edge has a series of Chebyshev polynomials, by their recurrence, of the input after a map."""

    def __init__(self, inputs: int, outputs: int, degree: int, enter: nn.Module) -> None:
        super().__init__()
        self.enter, self.degree = enter, degree
        self.coeffs = nn.Parameter(
            torch.randn(inputs, outputs, degree + 1) / math.sqrt(inputs * (degree + 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums over the edges."""
        x = self.enter(x)
        basis = [torch.ones_like(x), x]
        for _ in range(self.degree - 1):
            basis.append(2 * x * basis[-1] - basis[-2])
        return torch.einsum("bid,iod->bo", torch.stack(basis, -1), self.coeffs)


@sick(
    "contact12a-kan-recurrence",
    [("EXPLODING", "*")],
    every(huge("layer1", 1e5), stuck(100.0)),
    source="https://github.com/SynodicMonth/ChebyKAN/issues/2",
    allow=("UNSTABLE", "NUMERICAL"),
    falls_to=0.4,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def kan_recurrence(sick: bool, width: int) -> Setup:
    """The polynomials are fed unbounded numbers, and outside of -1 to 1 they grow as powers, from layer to
    layer as powers of powers, and their gradients too; a hyperbolic tangent before each layer repairs it."""
    sizes = [5, width // 2, width // 2, 1]
    enter = nn.Identity if sick else nn.Tanh
    layers = {
        f"layer{i + 1}": PolynomialLayer(a, b, 2, enter())
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }
    waves = normal(seeded(40), 5)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 5)
        return x, torch.sin(x @ waves)[:, None] + x[:, :1]

    return setup(stack(**layers), sample, F.mse_loss, 5e-3)


# ------------------------------------------------------------------------------------------ world models


class WorldVAE(nn.Module):
    """A variational autoencoder of frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = stack(
            conv1=nn.Conv2d(1, width, 4, stride=2, padding=1),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(width, width, 3, stride=2, padding=1),
            act2=nn.ReLU(),
            flat=nn.Flatten(),
        )
        self.mu = nn.Linear(9 * width, 6)
        self.log_var = nn.Linear(9 * width, 6)
        self.decoder = stack(fc1=nn.Linear(6, 4 * width), act1=nn.ReLU(), fc2=nn.Linear(4 * width, 144))
        self.g = seeded(39)

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction and the divergence of each sample."""
        hidden = self.encoder(frame)
        mu, log_var = self.mu(hidden), self.log_var(hidden)
        z = mu + (log_var / 2).exp() * normal(self.g, *mu.shape)
        divergence = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1)
        return self.decoder(z).view_as(frame), divergence


@sick(
    "contact12a-frames-latent",
    [("BOTTLENECK", "*")],
    every(still("mu", 0.1, steps=20), stuck(0.3, steps=200)),
    source="https://github.com/AppliedDataSciencePartners/WorldModels/issues/12",
    allow=("DEAD", "VANISHING"),
    steps=200,
    falls_to=0.7,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def frames_latent(sick: bool, width: int) -> Setup:
    """The error of reconstruction is averaged over the pixels and the divergence is not, so the divergence
    rules, the code carries nothing and every frame is reconstructed as the same mean; summing over pixels
    repairs it."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        at = 2 + 8 * uniform(g, 32, 2, 1, 1)
        frame = (-((rows - at[:, 0]).square() + (columns - at[:, 1]).square()) / 8).exp()[:, None]
        return 3 * frame, 3 * frame

    def loss(output: tuple[Tensor, Tensor], frame: Tensor) -> Tensor:
        weight = 1.0 if sick else 1 / frame[0].numel()
        return F.mse_loss(output[0], frame) + weight * output[1].mean()

    return setup(WorldVAE(width), sample, loss, 3e-3)


# ---------------------------------------- healthy: flows for SR


class FlowStep(nn.Module):
    """An affine coupling that a small picture conditions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6 + 3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result, with its halves exchanged, and the logarithm of the volume."""
        first, second = x.chunk(2, 1)
        shift, scale = self.conv2(F.relu(self.conv1(torch.cat([first, small], 1)))).chunk(2, 1)
        scale = 2 * torch.tanh(scale)
        return torch.cat([second * scale.exp() + shift, first], 1), scale.flatten(1).sum(1)


class SuperResolutionFlow(nn.Module):
    """The likelihood of a picture given its small version."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(FlowStep(width) for _ in range(4))

    def forward(self, image: Tensor, small: Tensor) -> Tensor:
        """Return the negative logarithm of the density for each number of the picture."""
        x = F.pixel_unshuffle(image, 2)
        volume = torch.zeros(len(image))
        for step in self.steps:
            x, change = step(x, small)
            volume = volume + change
        density = -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1) + volume
        return -density / image[0].numel()


@healthy(
    "contact12a-superres-likelihood",
    below_zero(60),
    source="https://github.com/andreas128/SRFlow/issues/12",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def superres_likelihood(width: int) -> Setup:
    """The loss of a flow falls below zero and keeps falling; a density may be above one, so this is as it
    should be, as the author says."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
        slope, level = normal(g, 16, 3, 2, 1, 1) / 8, 0.3 * normal(g, 16, 3, 1, 1)
        image = slope[:, :, 0] * (rows - 3.5) + slope[:, :, 1] * (columns - 3.5) + level
        image = image + 0.05 * normal(g, 16, 3, 8, 8)
        return (image, F.avg_pool2d(image, 2)), None

    return setup(SuperResolutionFlow(width), sample, lambda output, _: output.mean(), 3e-3)


# ---------------------------------------- healthy: losses that are sums


@healthy(
    "contact12a-video-summed",
    huge("*", 300),
    source="https://github.com/PKU-YuanGroup/WF-VAE/issues/18",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def video_summed(width: int) -> Setup:
    """The reconstruction loss of a video autoencoder is summed over all pixels, so losses and gradients are
    in the hundreds and thousands; the optimizer does not mind, and the authors say that it is normal."""
    model = stack(
        encoder=stack(
            conv1=nn.Conv3d(1, width, 3, stride=2, padding=1),
            act1=nn.SiLU(),
            conv2=nn.Conv3d(width, 4, 3, padding=1),
        ),
        decoder=stack(
            conv1=nn.Conv3d(4, width, 3, padding=1),
            act1=nn.SiLU(),
            up=nn.ConvTranspose3d(width, 1, 4, stride=2, padding=1),
        ),
    )
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    time = torch.arange(8.0)[:, None, None]

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        at, speed = 2 + 12 * uniform(g, 8, 2, 1, 1, 1), 0.7 * normal(g, 8, 2, 1, 1, 1)
        far = (rows - at[:, 0] - speed[:, 0] * time).square() + (
            columns - at[:, 1] - speed[:, 1] * time
        ).square()
        video = 4 * (-far / 12).exp()[:, None]
        return video, video

    def loss(output: Tensor, video: Tensor) -> Tensor:
        return (output - video).abs().sum() / len(video)

    return setup(model, sample, loss, 3e-3)


# ----------------------------------------------------------------------------------- healthy: gates that wait


class GatedAxialAttention(nn.Module):
    """Attention along one axis with terms for relative positions, each behind a scalar gate."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.relative = nn.Parameter(0.3 * torch.randn(3, size, size, width))
        self.f_qr = nn.Parameter(torch.tensor(0.1), requires_grad=False)
        self.f_kr = nn.Parameter(torch.tensor(0.1), requires_grad=False)
        self.f_sv = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.f_sve = nn.Parameter(torch.tensor(0.1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend along the last axis but one."""
        q, k, v = self.qkv(x).chunk(3, -1)
        to_q, to_k, to_v = self.relative
        logits = q @ k.transpose(-1, -2) + self.f_qr * torch.einsum("...ic,ijc->...ij", q, to_q)
        logits = logits + self.f_kr * torch.einsum("...jc,ijc->...ij", k, to_k)
        weights = (logits / math.sqrt(x.shape[-1])).softmax(-1)
        return self.f_sv * (weights @ v) + self.f_sve * torch.einsum("...ij,ijc->...ic", weights, to_v)


class MedicalTransformer(nn.Module):
    """Segmentation by attention along rows and then along columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.rows = GatedAxialAttention(width, 12)
        self.columns = GatedAxialAttention(width, 12)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of the mask."""
        x = F.relu(self.stem(image)).permute(0, 2, 3, 1)
        x = x + self.rows(x)
        x = x + self.columns(x.transpose(1, 2)).transpose(1, 2)
        return self.out(self.norm(x).permute(0, 3, 1, 2))


GATES = tuple(f"{axis}.{gate}" for axis in ("rows", "columns") for gate in ("f_qr", "f_kr", "f_sv", "f_sve"))


@healthy(
    "contact12a-medical-gates",
    no_gradient(*GATES),
    source="https://github.com/jeya-maria-jose/Medical-Transformer/issues/70",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def medical_gates(width: int) -> Setup:
    """The gates of the positional terms are kept fixed for the first epochs and get no gradient; that is the
    authors' schedule, and everything else trains."""
    return setup(MedicalTransformer(width), discs(), F.binary_cross_entropy_with_logits, 2e-3)
