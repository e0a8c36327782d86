"""Cases from public reports: equations and operators, generative models, learning to learn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .claims import Claim, fading, flat, not_finite, training, zero_at_first
from .data import choice, factors, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick

W = 16
ONE = {"widths": (W,), "dtypes": (FLOAT32,)}


# ---------------------------------------------------------------------------- equations, operators


class _Oscillator(nn.Module):
    """A network for the solution of a driven oscillator, with its initial values built in."""

    def __init__(self, width: int, reach: float) -> None:
        super().__init__()
        self.reach = reach
        self.hidden = nn.ModuleList([nn.Linear(1, 2 * width), nn.Linear(2 * width, 2 * width)])
        self.last = nn.Linear(2 * width, 1)

    def solution(self, t: Tensor) -> Tensor:
        h = t / self.reach
        for layer in self.hidden:
            h = torch.tanh(layer(h))
        start = 1 - torch.exp(-t)
        return 0.1 - 0.2 * start + start**2 * self.last(h)

    def forward(self, t: Tensor) -> dict[str, Tensor]:
        t = t.detach().requires_grad_()
        y = self.solution(t)
        (dy,) = torch.autograd.grad(y.sum(), t, create_graph=True)
        (ddy,) = torch.autograd.grad(dy.sum(), t, create_graph=True)
        return {"y": y, "residual": ddy + 0.2 * (y**2 - 1) * dy + y + y**3 - 0.53 * torch.cos(0.1 * t)}


@sick(
    "contact5b-oscillator-long-domain",
    [("SATURATION", "hidden")],
    flat("hidden.0", "tanh of", 0.6, steps=1),
    allow=("VANISHING", "BOTTLENECK", "EXPLODING", "UNSTABLE"),
    source="https://github.com/NeuroDiffGym/neurodiffeq/issues/90",
    steps=240,
    falls_to=0.5,
    **ONE,
)
def oscillator_long_domain(sick: bool, width: int) -> Setup:
    """An equation is solved on [0, 50] with the time as it is: the first tanh is at its ends for nearly all
    times. Repaired by giving the network time over fifty."""
    return setup(
        _Oscillator(width, reach=1.0 if sick else 50.0),
        lambda g: (50 * uniform(g, 64, 1), None),
        lambda output, _: (output["residual"] ** 2).mean(),
        1e-2,
    )


class _Spectral(nn.Module):
    def __init__(self, width: int, modes: int, scale: float, centred: bool) -> None:
        super().__init__()
        self.modes = modes
        draw = torch.randn if centred else torch.rand
        self.weight = nn.Parameter(scale * draw(width, width, modes, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros_like(spectrum)
        kernel = torch.view_as_complex(self.weight)
        out[..., : self.modes] = torch.einsum("bim,iom->bom", spectrum[..., : self.modes], kernel)
        return torch.fft.irfft(out, n=x.shape[-1])


class _Operator(nn.Module):
    def __init__(self, width: int, depth: int, edge: bool) -> None:
        super().__init__()
        self.lift = nn.Conv1d(2, width, 1)
        # On the edge a layer keeps the mean square through the truncation to its modes and the ReLU.
        scale = math.sqrt(1 / width) if edge else 1 / width**2
        self.blocks = nn.ModuleList([_Spectral(width, 8, scale, edge) for _ in range(depth)])
        self.project = nn.Conv1d(width, 1, 1)

    def forward(self, a: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, a.shape[-1]).expand_as(a)
        x = self.lift(torch.stack([a, grid], 1))
        for block in self.blocks:
            x = F.relu(block(x))
        return self.project(x).squeeze(1)


def _heat(g: torch.Generator) -> tuple[Tensor, Tensor]:
    k = torch.arange(9)
    spectrum = torch.complex(normal(g, 16, 9), normal(g, 16, 9)) * 8 / (1 + k)
    start = torch.fft.irfft(spectrum, n=32)
    return start, torch.fft.irfft(spectrum * torch.exp(-0.1 * k**2), n=32)


@sick(
    "contact5b-operator-deep-spectral",
    [("VANISHING", "*")],
    fading("lift", "blocks.5", 1e-4),
    allow=("BOTTLENECK", "DEAD"),
    source="https://ar5iv.labs.arxiv.org/html/2310.06379",
    **ONE,
)
def operator_deep_spectral(sick: bool, width: int) -> Setup:
    """A deep Fourier operator without skips starts from the usual weights, uniform below one over the square
    of the width: each spectral layer shrinks the signal and its gradient some tenfold. Repaired by weights on
    the edge of chaos."""
    return setup(_Operator(width, 6, edge=not sick), _heat, F.mse_loss)


# --------------------------------------------------------------- generative models, meta-learning


class _Step(nn.Module):
    """A coupling whose network starts at zero, so that it is the identity."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(size // 2, 2 * width), nn.Linear(2 * width, size)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        shift, log_scale = self.outer(F.relu(self.inner(a))).chunk(2, 1)
        log_scale = 2 * torch.tanh(log_scale / 2)
        return torch.cat([b * log_scale.exp() + shift, a], 1), log_scale.sum(1)


class _Flow(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList([_Step(size, width) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for step in self.steps:
            x, log_det = step(x)
            total = total + log_det
        return 0.5 * (x**2).sum(1) - total


@healthy("contact5b-flow-zero-start", zero_at_first(*(f"steps.{i}.inner" for i in range(6))), **ONE)
def flow_zero_start(width: int) -> Setup:
    """A flow whose couplings start as the identity: their inner layers get no gradient at all in the first
    step and do from the second."""
    return setup(_Flow(8, width), factors(8, 3, noise=0.3), lambda energy, _: energy.mean())


class _Codes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 2 * width), nn.ReLU(), nn.Linear(2 * width, 4))
        self.codebook = nn.Embedding(32, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 2 * width), nn.ReLU(), nn.Linear(2 * width, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.layer_norm(self.encoder(x), (4,))
        code = self.codebook(torch.cdist(z.detach(), self.codebook.weight.detach()).argmin(1))
        kept = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        return self.decoder(z + (code - z).detach()), kept


def _idle_codes(share: float) -> Claim:
    """More than a share of the codes gets no gradient in a step."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, 40)
        grad = last.grads["codebook.weight"]
        seen = 1.0 if grad is None else float((grad == 0).all(1).float().mean())
        return seen > share, f"{seen:.0%} of the codes get no gradient"

    return claim


def _grouped(g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = 1.2 * normal(seeded(34), 10, 12)[choice(g, 10, 64)] + 0.2 * normal(g, 64, 12)
    return x, x


@healthy("contact5b-codes-straight-through", _idle_codes(0.3), **ONE)
def codes_straight_through(width: int) -> Setup:
    """Quantized codes with the straight-through gradient: the choice has no gradient, and many of the codes
    are chosen by no sample of a batch since there are more codes than groups in the data. It learns them."""
    return setup(_Codes(width), _grouped, lambda output, x: F.mse_loss(output[0], x) + output[1], 1e-2)


class _MetaAdam(nn.Module):
    """A network that is adapted to each task by steps of Adam, through which the outer loss goes back."""

    def __init__(self, width: int, inside: float) -> None:
        super().__init__()
        self.inside = inside
        self.net = nn.Sequential(
            nn.Linear(1, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, 1),
        )

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        out = []
        for xs, ys, q in zip(x, y, query, strict=True):
            fast: dict[str, Tensor] = dict(self.net.named_parameters())
            first = {n: torch.zeros_like(p) for n, p in fast.items()}
            second = {n: torch.zeros_like(p) for n, p in fast.items()}
            for t in (1, 2):
                loss = F.mse_loss(functional_call(self.net, fast, (xs,)), ys)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                for (n, p), g in zip(list(fast.items()), grads, strict=True):
                    first[n] = 0.9 * first[n] + 0.1 * g
                    second[n] = 0.99 * second[n] + 0.01 * g**2
                    rate = (second[n] / (1 - 0.99**t) + self.inside).sqrt() + 1e-8
                    fast[n] = p - 0.01 * first[n] / (1 - 0.9**t) / rate
            out.append(functional_call(self.net, fast, (q,)))
        return torch.stack(out)


def _waves(g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    height, phase = 1 + uniform(g, 4, 1, 1), 0.5 * uniform(g, 4, 1, 1)
    x = 4 * uniform(g, 4, 18, 1) - 2
    y = height * torch.sin(x + phase)
    return (x[:, :8], y[:, :8], x[:, 8:]), y[:, 8:]


@sick(
    "contact5b-meta-adam-root",
    [("NUMERICAL", "*")],
    not_finite(),
    source="https://github.com/metaopt/torchopt/issues/26",
    **ONE,
)
def meta_adam_root(sick: bool, width: int) -> Setup:
    """The inner steps of a meta-learner are Adam's: units that no support point switches on have gradients of
    zero, whose square's root has an endless slope, and the outer gradient is not a number though the loss is.
    Repaired by a small number under the root."""
    return setup(_MetaAdam(width, 0.0 if sick else 1e-3), _waves, F.mse_loss)
