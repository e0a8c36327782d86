"""Sick models of public reports: speech, forecasting, differential equations, diffusion, quantization."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, alike, not_finite, strong, tiny, training
from .data import choice, clusters, normal, seeded, setup, sgd, trained, uniform
from .registry import FLOAT32, Setup, sick

ONLY = (FLOAT32,)


# ------------------------------------------------------------------------ the magnitude of silence


class STFT(nn.Module):
    """Magnitudes of a windowed Fourier transform, by convolution with fixed kernels."""

    real: Tensor
    imag: Tensor

    def __init__(self, size: int, hop: int, eps: float) -> None:
        super().__init__()
        angle = 2 * math.pi * torch.arange(size // 2 + 1)[:, None] * torch.arange(size) / size
        window = torch.hann_window(size)
        self.register_buffer("real", (torch.cos(angle) * window)[:, None])
        self.register_buffer("imag", (torch.sin(angle) * window)[:, None])
        self.hop, self.eps = hop, eps

    def forward(self, wave: Tensor) -> Tensor:
        real = F.conv1d(wave[:, None], self.real, stride=self.hop)
        imag = F.conv1d(wave[:, None], self.imag, stride=self.hop)
        return torch.sqrt(real.pow(2) + imag.pow(2) + self.eps)


class Enhancer(nn.Module):
    """A mask on the noisy wave by dilated convolutions, and the magnitudes of what it leaves."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.inp = nn.Conv1d(1, width, 5, padding=2)
        self.dilated = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=2**i, dilation=2**i) for i in range(3)
        )
        self.mask = nn.Conv1d(width, 1, 1)
        self.stft = STFT(32, 16, eps)

    def forward(self, noisy: Tensor) -> dict[str, Tensor]:
        h = F.leaky_relu(self.inp(noisy[:, None]))
        for conv in self.dilated:
            h = h + F.leaky_relu(conv(h))
        wave = noisy * torch.sigmoid(self.mask(h))[:, 0]
        return {"wave": wave, "spec": self.stft(wave)}


@sick(
    "contact1a-speech-magnitude",
    [("NUMERICAL", "*")],
    not_finite(3, loss=False),
    allow=["EXPLODING"],
    source="https://github.com/KinWaiCheuk/nnAudio/issues/138",
    widths=(16,),
    dtypes=ONLY,
)
def magnitude(sick: bool, width: int) -> Setup:
    """Shorter utterances are padded with zeros, whose spectrum is 0, where the square root has no
    derivative: the loss is a number and every gradient is NaN. A small constant under the root helps."""
    measure = STFT(32, 16, 0.0 if sick else 1e-8)
    time = torch.arange(256)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        pitch = 0.2 + 0.3 * uniform(g, 8, 1)
        clean = torch.sin(pitch * time + 6 * uniform(g, 8, 1))
        noise = (time % 16 < 4) * normal(g, 8, 256) * 2
        length = 96 + choice(g, 160, 8, 1)
        return (clean + noise) * (time < length), measure(clean * (time < length))

    return setup(
        Enhancer(width, 0.0 if sick else 1e-8), sample, lambda out, spec: (out["spec"] - spec).abs().mean()
    )


# -------------------------------------------------------------------- forecasts scaled back by nothing


class Forecaster(nn.Module):
    """Normed patches of the past through a small transformer to the future, scaled back at the end."""

    def __init__(self, width: int, guarded: bool) -> None:
        super().__init__()
        self.guarded = guarded
        self.tokenizer, self.freq_emb = nn.Linear(8, width), nn.Embedding(3, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.horizon = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 16))

    def forward(self, past: Tensor, freq: Tensor) -> Tensor:
        mu, sigma = past.mean(-1, keepdim=True), past.std(-1, keepdim=True)
        safe = torch.where(sigma < 1e-6, torch.ones_like(sigma), sigma)
        x = self.tokenizer(((past - mu) / safe).unflatten(-1, (-1, 8))) + self.freq_emb(freq)[:, None]
        for layer in self.layers:
            x = layer(x)
        return self.horizon(x[:, -1]) * (safe if self.guarded else sigma) + mu


@sick(
    "contact1a-forecast-revin",
    [("VANISHING", "*")],
    tiny("*", 1e-4),
    allow=["DEAD", "BOTTLENECK"],
    source="https://github.com/google-research/timesfm/issues/522",
    widths=(32,),
    dtypes=ONLY,
)
def revin(sick: bool, width: int) -> Setup:
    """Sensors at rest: the past is divided by a guarded deviation, and the forecast is multiplied by the
    bare one, which is next to nothing, as is then every gradient. The same guard at both ends helps."""
    shapes = normal(seeded(6), 3, 16)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        freq = choice(g, 3, 32)
        return (1e-7 * normal(g, 32, 32), freq), shapes[freq] + 0.1 * normal(g, 32, 16)

    return setup(Forecaster(width, guarded=not sick), sample, F.mse_loss)


# ------------------------------------------------------------- representations that agree on nothing


class SeriesJEPA(nn.Module):
    """Predicts the encoded second half of a series from its encoded first half; `teacher`: what is to be
    predicted comes from a slow copy of the encoder, without a gradient, and not from the encoder itself."""

    def __init__(self, width: int, teacher: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(3, width, 5, 2), nn.GELU(), nn.Conv1d(width, width, 5, 2), nn.GELU()
        )
        self.project = nn.Linear(width, width)
        self.predictor = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.slow = nn.ModuleList([frozen_copy(self.encoder), frozen_copy(self.project)]) if teacher else None

    def forward(self, series: Tensor) -> dict[str, Tensor]:
        past, future = series.chunk(2, -1)
        context = self.project(self.encoder(past).mean(-1))
        if self.slow is None:
            target = self.project(self.encoder(future).mean(-1))
        else:
            encoder, project = self.slow[0], self.slow[1]
            own = [*self.encoder.parameters(), *self.project.parameters()]
            for copied, p in zip(self.slow.parameters(), own, strict=True):
                copied.data.lerp_(p.data, 0.004)
            target = F.layer_norm(project(encoder(future).mean(-1)), context.shape[-1:])
        return {"predicted": self.predictor(context), "target": target}


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a copy with nothing in it to train."""
    return copy.deepcopy(module).requires_grad_(False)


@sick(
    "contact1a-forecast-jepa",
    [("BOTTLENECK", "*")],
    alike("project", 0.1),
    allow=["VANISHING", "DEAD"],
    source="https://github.com/galilai-group/lejepa/issues/31",
    steps=200,
    widths=(32,),
    dtypes=ONLY,
)
def jepa(sick: bool, width: int) -> Setup:
    """The encoder is trained on both sides of the prediction, and makes it easy: after some steps all
    series look alike to it. A slow copy of the encoder as the target, without a gradient, prevents that."""

    def sample(g: Generator) -> tuple[Tensor, None]:
        rate, phase = 0.2 + 0.8 * uniform(g, 64, 3, 1), 6.3 * uniform(g, 64, 3, 1)
        level = normal(g, 64, 3, 1)
        return torch.sin(rate * torch.arange(64) + phase) + level + 0.1 * normal(g, 64, 3, 64), None

    ready = setup(
        SeriesJEPA(width, teacher=not sick), sample, lambda o, _: F.mse_loss(o["predicted"], o["target"])
    )
    return trained(ready, 150) if sick else ready


# ---------------------------------------------------------------------- equations that blow up


class ControlledODE(nn.Module):
    """A state that a path drives through a learned field, in steps of Euler; a class from where it ends."""

    def __init__(self, width: int, channels: int, bounded: bool) -> None:
        super().__init__()
        self.bounded, self.shape = bounded, (width, channels)
        self.initial = nn.Linear(channels, width)
        self.linear1, self.linear2 = nn.Linear(width, 64), nn.Linear(64, width * channels)
        self.readout = nn.Linear(width, 1)

    def field(self, z: Tensor) -> Tensor:
        z = self.linear2(self.linear1(z).relu())
        return (z.tanh() if self.bounded else z).unflatten(-1, self.shape)

    def forward(self, path: Tensor) -> Tensor:
        z = self.initial(path[:, 0])
        for step in path.diff(dim=1).unbind(1):
            z = z + (self.field(z) @ step[..., None])[..., 0]
        return self.readout(z)[:, 0]


@sick(
    "contact1a-ode-controlled",
    [("EXPLODING", "*")],
    strong("initial", 1e3),
    allow=["NUMERICAL", "UNSTABLE", "SATURATION"],
    source="https://github.com/patrick-kidger/NeuralCDE/issues/2",
    widths=(16,),
    dtypes=ONLY,
)
def controlled(sick: bool, width: int) -> Setup:
    """The learned field grows with the state it moves, and along the path the state runs away, and the
    gradient on its way back. A tanh at the field's end bounds it."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 2, 32)
        time = torch.arange(41.0)
        rate = torch.where(kind == 0, 0.4, 0.7)[:, None]
        angle = rate * time + 6.3 * uniform(g, 32, 1)
        path = torch.stack([0.2 * time.expand(32, -1), 6 * angle.sin(), 6 * angle.cos()], -1)
        return path + 0.05 * normal(g, 32, 41, 3), kind.float()

    return setup(ControlledODE(width, 3, not sick), sample, F.binary_cross_entropy_with_logits)


# ------------------------------------------------------------------------- weights of no signal


def cumulative(steps: int) -> Tensor:
    """Return the products of a linear schedule, rescaled so that nothing is left of the data at its end."""
    root = torch.linspace(1e-3, 0.25, steps).neg().add(1).cumprod(0).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


class Denoiser(nn.Module):
    """The noise in a point, from the point and the time."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.time = nn.Embedding(steps, width)
        self.inp, self.mid, self.out = nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.inp(x) + self.time(t))
        return self.out(h + F.silu(self.mid(h)))


@sick(
    "contact1a-diffusion-minsnr",
    [("NUMERICAL", "*")],
    not_finite(12, loss=True),
    source="https://github.com/TiankaiHang/Min-SNR-Diffusion-Training/pull/4",
    steps=200,
    widths=(64,),
    dtypes=ONLY,
)
def min_snr(sick: bool, width: int) -> Setup:
    """The schedule ends without any signal, and the clipped ratio of signal to noise is divided by that
    ratio: 0/0 for samples of the last time. Setting the weight to 1 there helps."""
    steps = 30
    alphas = cumulative(steps)
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5) / snr
    if not sick:
        weights[snr == 0] = 1

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        angle = 6.3 * uniform(g, 64, 1)
        data, noise = torch.cat([angle.cos(), angle.sin()], 1), normal(g, 64, 2)
        t = choice(g, steps, 64)
        kept = alphas[t, None]
        return (kept.sqrt() * data + (1 - kept).sqrt() * noise, t), (noise, t)

    def loss(out: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        noise, t = target
        return (F.mse_loss(out, noise, reduction="none").mean(1) * weights[t]).mean()

    return setup(Denoiser(width, steps), sample, loss)


# --------------------------------------------------------------------- step sizes that step over zero


class StepSize(nn.Module):
    """Rounds to 16 levels of a learned step size, straight through; `scaled`: the step size's gradient is
    divided by the root of how many numbers it serves, and the step size is kept above zero."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled
        self.s = nn.Parameter(torch.ones(1))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.s.data = 2 * x.detach().abs().mean().reshape(1) / math.sqrt(7)
            self.ready = True
        s = self.s
        if self.scaled:
            part = s / math.sqrt(7 * x.numel())
            s = ((s - part).detach() + part).clamp_min(1e-4)
        level = (x / s).clamp(-8, 7)
        return (level + (level.round() - level).detach()) * s


class QuantLinear(nn.Linear):
    """A linear layer of rounded weights on rounded inputs."""

    def __init__(self, inputs: int, outputs: int, scaled: bool) -> None:
        super().__init__(inputs, outputs)
        self.activation_quantizer, self.weight_quantizer = StepSize(scaled), StepSize(scaled)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.activation_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class QuantNet(nn.Module):
    """Three such layers."""

    def __init__(self, width: int, scaled: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = QuantLinear(16, width, scaled), QuantLinear(width, width, scaled)
        self.fc3 = QuantLinear(width, 4, scaled)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def thrown(times: float, *, steps: int = 15) -> Claim:
    """Claim: some step of the optimizer changes a step size by a multiple of what it was."""

    def claim(ready: Setup) -> tuple[bool, str]:
        sizes = [q.s for q in ready.model.modules() if isinstance(q, StepSize)]
        seen = [torch.cat([s.detach().clone() for s in sizes]) for _ in training(ready, steps)]
        worst = max(float(((b - a) / a).abs().max()) for a, b in itertools.pairwise(seen))
        return worst > times, f"a step size changes by {worst:.2g} times itself"

    return claim


@sick(
    "contact1a-quant-stepsize",
    [("UNSTABLE", "*")],
    thrown(3),
    allow=["EXPLODING", "NUMERICAL", "DEAD", "SATURATION", "VANISHING", "BOTTLENECK"],
    source="https://github.com/ZouJiu1/LSQplus/issues/12",
    widths=(128,),
    dtypes=ONLY,
)
def step_size(sick: bool, width: int) -> Setup:
    """A step size's gradient sums over all numbers it serves, and a step of the optimizer throws it past
    zero and about. Scaled by the root of their number, and kept positive, it learns."""
    return setup(QuantNet(width, scaled=not sick), clusters(16, 4, 64), F.cross_entropy, sgd(0.1, 0.9))
