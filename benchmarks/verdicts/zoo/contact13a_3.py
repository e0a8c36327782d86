"""Healthy trainings after public reports: what looked wrong to somebody and is as it should be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, flat, no_gradient, training, under, weak, zero_at_first
from .data import (
    choice,
    clusters,
    frozen,
    grammar,
    normal,
    seeded,
    setup,
    stack,
    surface,
    textures,
    token_loss,
    trained,
    uniform,
)
from .registry import FLOAT32, Setup, healthy

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


def ends_below_zero(steps: int = 120) -> Claim:
    """The loss is below zero at the end."""

    def claim(ready: Setup) -> tuple[bool, str]:
        end = [step.loss for step in training(ready, steps)][-1]
        return end < 0, f"loss after {steps} steps = {end:.3g}"

    return claim


def mostly_zero(prefix: str, share: float, *, steps: int = 3) -> Claim:
    """More than a share of the entries of a part's gradients is exactly zero."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps)
        parts = [g.flatten() for n, g in last.grads.items() if under(n, prefix) and g is not None]
        seen = float((torch.cat(parts) == 0).float().mean())
        return seen > share, f"{seen:.0%} of the gradient of {prefix} is zero"

    return claim


def first_step_rests() -> Claim:
    """The first step of the optimizer moves nothing."""

    def claim(ready: Setup) -> tuple[bool, str]:
        before = [p.detach().clone() for p in ready.model.parameters()]
        for _ in training(ready, 1):
            pass
        after = ready.model.parameters()
        moved = max(float((p - b).detach().abs().max()) for p, b in zip(after, before, strict=True))
        return moved == 0, f"largest change in the first step = {moved:.2g}"

    return claim


@healthy(
    "contact13a-healthy-sisdr",
    ends_below_zero(),
    source="https://github.com/zexupan/MuSE/issues/2",
    **ONE,
)
def sisdr(width: int) -> Setup:
    """Speech is cut out of a mixture, and the loss is the negative ratio of signal to distortion in decibels:
    that it goes far below zero is what it should do."""
    length = 64

    class Extractor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Conv1d(1, width, 8, 4)
            self.inner = nn.Sequential(
                nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1)
            )
            self.decode = nn.ConvTranspose1d(width, 1, 8, 4)

        def forward(self, mixture: Tensor) -> Tensor:
            code = torch.relu(self.encode(mixture[:, None]))
            return self.decode(code * torch.sigmoid(self.inner(code)))[:, 0]

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        time = torch.arange(length)
        voice = torch.sin((0.2 + 0.2 * uniform(g, 16, 1)) * time + 6.3 * uniform(g, 16, 1))
        other = torch.sin((1.5 + 0.5 * uniform(g, 16, 1)) * time + 6.3 * uniform(g, 16, 1))
        return voice + other, voice

    def loss(output: Tensor, voice: Tensor) -> Tensor:
        part = (output * voice).sum(1, keepdim=True) / voice.square().sum(1, keepdim=True) * voice
        ratio = part.square().sum(1) / ((output - part).square().sum(1) + 1e-6)
        return -10 * torch.log10(ratio + 1e-6).mean()

    return setup(Extractor(), sample, loss, 5e-3)


class Warming(torch.optim.AdamW):
    """AdamW whose rate climbs from zero in the first steps."""

    def __init__(self, params: Iterable[Tensor], rate: float, warmup: int) -> None:
        super().__init__(params, lr=rate)
        self.rate, self.warmup, self.taken = rate, warmup, 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = self.rate * min(self.taken / self.warmup, 1.0)
        self.taken += 1
        return super().step(closure)


@healthy(
    "contact13a-healthy-warmup",
    first_step_rests(),
    source="https://github.com/pytorch/torchtitan/pull/1261",
    **ONE,
)
def warmup(width: int) -> Setup:
    """The rate climbs from exactly zero over 15 steps: the first step is lost and the next ones are short,
    which is what a linear warm-up does."""
    model = nn.Sequential(
        nn.Embedding(16, width),
        nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True),
        nn.LayerNorm(width),
        nn.Linear(width, 16),
    )
    return setup(model, grammar(), token_loss, lambda p: Warming(p, 3e-3, 15))


class Thinned(torch.autograd.Function):
    """A parameter of whose gradient three tenths are left, chosen anew each time, and made larger."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (torch.rand_like(gradient) < 0.3) / 0.3


class Child(nn.Linear):
    """A linear layer with thinned gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Thinned.apply(self.weight), Thinned.apply(self.bias))


@healthy(
    "contact13a-healthy-child",
    mostly_zero("body", 0.6),
    source="https://github.com/pkunlp-icler/ChildTuning/issues/1",
    **ONE,
)
def child(width: int) -> Setup:
    """Fine-tuning of a child network: seven tenths of the gradients of a trained body are masked to zero in
    each step by chance, and the rest is made larger."""
    body = stack(a=Child(12, width), r=nn.Tanh(), b=Child(width, width), s=nn.Tanh())
    model = stack(body=body, head=nn.Linear(width, 1))
    trained(setup(model, surface(12, 64), F.mse_loss), 60)
    model[-1] = nn.Linear(width, 6)
    return setup(model, clusters(12, 6), F.cross_entropy, 2e-3)


@healthy(
    "contact13a-healthy-teacher",
    no_gradient("teacher"),
    source="https://github.com/wentianli/knowledge_distillation_caffe/issues/1",
    **ONE,
)
def teacher(width: int) -> Setup:
    """Distillation: the teacher is part of the model and gets no gradient at all, as it is not to learn."""

    class Pair(nn.Module):
        def __init__(self, master: nn.Module) -> None:
            super().__init__()
            self.teacher = frozen(master)
            self.student = stack(a=nn.Linear(16, width // 2), r=nn.ReLU(), b=nn.Linear(width // 2, 6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.student(x), self.teacher(x)

    master = stack(a=nn.Linear(16, width), r=nn.ReLU(), b=nn.Linear(width, 6))
    trained(setup(master, clusters(16, 6, 64), F.cross_entropy), 80)

    def loss(output: tuple[Tensor, Tensor], kind: Tensor) -> Tensor:
        mine, right = (logits / 4 for logits in output)
        soft = F.kl_div(mine.log_softmax(1), right.softmax(1), reduction="batchmean") * 16
        return 0.7 * soft + 0.3 * F.cross_entropy(output[0], kind)

    return setup(Pair(master), clusters(16, 6, 64), loss)


@healthy(
    "contact13a-healthy-alternating",
    zero_at_first("priors.1"),
    source="https://github.com/openai/jukebox/issues/252",
    **ONE,
)
def alternating(width: int) -> Setup:
    """Two heads take turns from batch to batch, so that each gets no gradient in every second step."""

    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stack(a=nn.Linear(12, width), r=nn.ReLU(), b=nn.Linear(width, width), s=nn.ReLU())
            self.priors = nn.ModuleList(nn.Linear(width, 5) for _ in range(2))

        def forward(self, x: Tensor, turn: Tensor) -> Tensor:
            return self.priors[int(turn)](self.body(x))

    source, count = clusters(12, 5), [0]

    def sample(g: Generator) -> tuple[Any, Tensor]:
        x, kind = source(g)
        turn = count[0] % 2
        count[0] += 1
        return (x, torch.tensor(turn)), kind if turn == 0 else (kind + 2) % 5

    return setup(Turns(), sample, F.cross_entropy)


class Fainter(torch.autograd.Function):
    """The same forward, a tenth of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.1 * gradient


@healthy(
    "contact13a-healthy-gradmult",
    weak("extractor", "context", 0.4),
    source="https://github.com/pytorch/audio/pull/2335",
    **ONE,
)
def gradmult(width: int) -> Setup:
    """A speech encoder whose feature extractor gets a tenth of the gradient on purpose, so that it learns
    without unrest below the context network."""

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.extractor = nn.Sequential(
                nn.Conv1d(1, width, 8, 4), nn.GELU(), nn.Conv1d(width, width, 4, 2)
            )
            self.norm = nn.LayerNorm(width)
            self.context = nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.0, batch_first=True, norm_first=True
            )
            self.head = nn.Linear(width, 4)

        def forward(self, wave: Tensor) -> Tensor:
            features = Fainter.apply(self.extractor(wave[:, None])).transpose(1, 2)
            return self.head(self.context(self.norm(features)).mean(1))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 4, 32)
        pitch = 0.2 + 0.3 * kind[:, None]
        return torch.sin(pitch * torch.arange(96) + 6.3 * uniform(g, 32, 1)) + 0.3 * normal(g, 32, 96), kind

    return setup(Speech(), sample, F.cross_entropy, 2e-3)


@healthy(
    "contact13a-healthy-shift",
    weak("features.0.bias", "features.0.weight", 1e-5),
    source="https://github.com/pathak22/context-encoder/issues/2",
    **ONE,
)
def shift(width: int) -> Setup:
    """Convolutions with a bias before batch normalisation, which takes it away again: the biases get no
    gradient but rounding, and nothing is lost as the normalisation has a shift of its own."""
    features = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )
    model = stack(
        features=features, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(width, 4)
    )
    return setup(model, textures(), F.cross_entropy)


@healthy(
    "contact13a-healthy-alignment",
    flat("scores", "softmax of", 0.5),
    source="https://github.com/TensorSpeech/TensorFlowTTS/issues/196",
    converged=True,
    **ONE,
)
def alignment(width: int) -> Setup:
    """A trained speech synthesizer whose attention is one-hot: each frame looks at one letter, and the frames
    of the padding all look at the same place, where the loss does not count. That is how it should align."""
    letters, most, each = 10, 8, 2
    sounds = normal(seeded(41), letters, 6)

    class Scores(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return query @ key.transpose(1, 2)

    class Voice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(letters, width)
            self.place = nn.Parameter(0.3 * torch.randn(most, width))
            self.frames = nn.Parameter(0.3 * torch.randn(most * each, width))
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, width)
            self.scores = Scores()
            self.decode = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 6))

        def forward(self, text: Tensor, length: Tensor) -> Tensor:
            text = self.embed(text)
            query = self.query(self.frames).expand(len(text), -1, -1)
            key = self.key(self.place).expand(len(text), -1, -1)
            weights = self.scores(query, key)
            weights = weights.masked_fill(torch.arange(most) >= length[:, None, None], -1e4).softmax(-1)
            return self.decode(weights @ text)

    def sample(g: Generator) -> tuple[Any, Any]:
        length = 4 + choice(g, most - 3, 32)
        text = choice(g, letters, 32, most)
        counts = (torch.arange(most * each) < each * length[:, None]).float()[..., None]
        target = sounds[text].repeat_interleave(each, 1) + 0.1 * normal(g, 32, most * each, 6)
        return (text, length), (target, counts)

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return ((output - target[0]).square() * target[1]).sum() / (6 * target[1].sum())

    ready = setup(Voice(), sample, loss, 2e-3)
    return trained(ready, 500, torch.optim.Adam(ready.model.parameters(), lr=1e-2))
