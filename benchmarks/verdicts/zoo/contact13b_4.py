"""Healthy models that public reports took for sick ones, or asked about."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .claims import flat, huge, no_gradient, stuck, zero_at_first
from .data import choice, clusters, discs, frozen, normal, seeded, setup, stack, textures, trained
from .registry import FLOAT32, Setup, healthy


class _Taught(nn.Module):
    """A segmentation student, and a teacher that is a moving average of it."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def net() -> nn.Module:
            return stack(
                a=nn.Conv2d(1, width, 3, padding=1),
                act1=nn.ReLU(),
                b=nn.Conv2d(width, width, 3, padding=1),
                act2=nn.ReLU(),
                out=nn.Conv2d(width, 1, 1),
            )

        self.student, self.teacher = net(), frozen(net())
        self.teacher.load_state_dict(self.student.state_dict())

    @torch.no_grad()
    def follow(self) -> None:
        for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            own.lerp_(other, 0.05)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            self.follow()
        labelled, free = x.chunk(2)
        with torch.no_grad():
            pseudo = self.teacher(free).sigmoid()
        return self.student(labelled), self.student(free + 0.3 * torch.randn_like(free)), pseudo


@healthy(
    "contact13b-healthy-teacher",
    no_gradient("teacher"),
    source="https://github.com/lhoyer/DAFormer/issues/59",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def healthy_teacher(width: int) -> Setup:
    """The teacher that makes the labels of the target pictures gets no gradient at all: it follows the
    student as a moving average, which is the method."""

    def loss(output: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> Tensor:
        told, free, pseudo = output
        sure = torch.where((pseudo - 0.5).abs() > 0.4, 1.0, 0.0)
        extra = F.binary_cross_entropy_with_logits(free, (pseudo > 0.5).float(), sure)
        return F.binary_cross_entropy_with_logits(told, mask.chunk(2)[0]) + 0.5 * extra

    return setup(_Taught(width), discs(16), loss)


class _Crossed(nn.Module):
    """A segmentation net with attention over positions, let in by a factor that starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = stack(
            conv=nn.Conv2d(1, width, 3, padding=1, bias=False), norm=nn.BatchNorm2d(width), act=nn.ReLU()
        )
        self.query = nn.Conv2d(width, width // 4, 1)
        self.key = nn.Conv2d(width, width // 4, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        seen = value @ (query.transpose(1, 2) @ key).softmax(-1).transpose(1, 2)
        return self.head(self.gamma * seen.view_as(x) + x)


@healthy(
    "contact13b-healthy-gamma",
    zero_at_first("query", "key", "value"),
    source="https://github.com/speedinghzl/CCNet/issues/87",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def healthy_gamma(width: int) -> Setup:
    """The factor before the attention starts at zero, so that the attention's layers have no gradient at
    first; the factor itself has one, leaves zero in the first step, and the attention starts to learn."""
    return setup(_Crossed(width), discs(), F.binary_cross_entropy_with_logits)


class _Codes(nn.Module):
    """Documents and queries as sparse codes that are compared by their inner product."""

    def __init__(self, width: int, size: int = 128) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(200, width, mode="mean")
        self.mix = nn.Linear(width, width)
        self.code = stack(lin=nn.Linear(width, size), act=nn.ReLU())

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.code(self.mix(3 * self.words(words)).relu())
        query, document = codes.chunk(2)
        return query @ document.T, codes


@healthy(
    "contact13b-healthy-sparse",
    flat("code", "sigmoid", 0.6, steps=30),
    source="https://github.com/hamed-zamani/snrm/issues/7",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_sparse(width: int) -> Setup:
    """Most entries of a code are exactly zero, and ever more of them: a penalty on their sum makes them so,
    since they are the keys of an inverted index. Other entries serve other documents."""
    topics = choice(seeded(41), 200, 20, 12)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        topic = torch.randperm(20, generator=g)[:16]
        words = topics[topic.repeat(2)].gather(1, choice(g, 12, 32, 6))
        return words, torch.arange(16)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        scores, codes = output
        return F.cross_entropy(scores, target) + 2e-2 * codes.abs().sum(1).mean()

    return setup(_Codes(width), sample, loss)


class _Margin(nn.Module):
    """Identities by the angle to class centres, with a margin on the right one and a large scale."""

    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        self.body = stack(
            a=nn.Linear(16, width, bias=False),
            norm=nn.BatchNorm1d(width),
            act=nn.ReLU(),
            b=nn.Linear(width, width),
        )
        self.centres = nn.Parameter(torch.randn(kinds, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.body(x)), F.normalize(self.centres)).clamp(-1 + 1e-6, 1 - 1e-6)


@healthy(
    "contact13b-healthy-margin",
    stuck(6.0, steps=10),
    source="https://github.com/heshuting555/AICITY2020_DMT_VehicleReID/issues/3",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_margin(width: int) -> Setup:
    """With a margin on the angle and a scale of thirty the loss starts at many times the logarithm of the
    number of identities, and not one is recognised for a while; that passes."""

    def loss(cosine: Tensor, kind: Tensor) -> Tensor:
        right = F.one_hot(kind, cosine.shape[1]).bool()
        moved = torch.cos(torch.acos(cosine) + 0.5)
        return F.cross_entropy(30 * torch.where(right, moved, cosine), kind)

    return setup(_Margin(width, 24), clusters(16, 24, 64), loss)


class _Rising(torch.optim.Adam):
    """Adam whose rate rises in a line from zero over the first steps."""

    def __init__(self, parameters, lr: float, steps: int) -> None:
        super().__init__(parameters, lr=lr)
        self.top, self.steps, self.done = lr, steps, 0

    def step(self, closure=None):
        self.done += 1
        for group in self.param_groups:
            group["lr"] = self.top * min(1.0, self.done / self.steps)
        return super().step(closure)


class _Denoiser(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Embedding(50, width)
        self.inlet = nn.Linear(16, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.inlet(x) + self.time(t)
        for layer in self.layers:
            h = h + F.silu(layer(h))
        return self.head(F.silu(h))


@healthy(
    "contact13b-healthy-warmup",
    stuck(0.9, steps=12),
    source="https://github.com/GauleeJX/flodiff/issues/9",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def healthy_warmup(width: int) -> Setup:
    """The loss of a diffusion model hardly moves at first and then falls: the rate warms up over the first
    steps."""
    curve = torch.linspace(0.98, 0.02, 50)
    shapes = normal(seeded(42), 2, 16)

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        clean = normal(g, 64, 2) @ shapes
        t, noise = choice(g, 50, 64), normal(g, 64, 16)
        share = curve[t][:, None]
        return (share.sqrt() * clean + (1 - share).sqrt() * noise, t), noise

    return setup(_Denoiser(width), sample, F.mse_loss, lambda p: _Rising(p, 1e-2, 40))


class _SelfTaught(nn.Module):
    """A classifier whose last layer stands still over the first steps."""

    def __init__(self, width: int, still: int) -> None:
        super().__init__()
        self.body = stack(
            a=nn.Conv2d(3, width, 3, padding=1),
            act1=nn.ReLU(),
            b=nn.Conv2d(width, width, 3, padding=1),
            act2=nn.ReLU(),
        )
        self.hidden = nn.Linear(width, width)
        self.last = nn.Linear(width, 4, bias=False)
        self.still, self.done = still, 0

    def forward(self, x: Tensor) -> Tensor:
        self.done += 1
        x = F.normalize(self.hidden(self.body(x).mean((2, 3))), dim=1)
        weight = F.normalize(self.last.weight, dim=1)
        return F.linear(x, weight.detach() if self.done <= self.still else weight) / 0.1


@healthy(
    "contact13b-healthy-still",
    no_gradient("last", after=6),
    source="https://github.com/facebookresearch/dino/issues/61",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_still(width: int) -> Setup:
    """The last layer is frozen over the first steps, as it should be in this method, and learns later."""
    return setup(_SelfTaught(width, 8), textures(), F.cross_entropy)


@healthy(
    "contact13b-healthy-floor",
    stuck(2.0, steps=20),
    source="https://github.com/leftthomas/SimCLR/issues/14",
    converged=True,
    widths=(64,),
    dtypes=(FLOAT32,),
)
def healthy_floor(width: int) -> Setup:
    """The contrastive loss stays between two and four for good: with a temperature of one half and unit rows
    it cannot go lower, since the other pictures of the batch always count."""
    model = stack(
        a=nn.Linear(32, width),
        act=nn.ReLU(),
        b=nn.Linear(width, width),
        act2=nn.ReLU(),
        c=nn.Linear(width, 16),
    )

    def sample(g: torch.Generator) -> tuple[Tensor, None]:
        x = normal(g, 32, 32)
        return torch.cat([x + 0.2 * normal(g, 32, 32), x + 0.2 * normal(g, 32, 32)]), None

    def loss(rows: Tensor, _: None) -> Tensor:
        rows = F.normalize(rows, dim=1)
        scores = (rows @ rows.T / 0.5).masked_fill(torch.eye(64).bool(), -math.inf)
        return F.cross_entropy(scores, (torch.arange(64) + 32) % 64)

    return trained(setup(model, sample, loss, 3e-3), 250)


class _Summed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = stack(a=nn.Linear(256, width), act=nn.ReLU())
        self.mean, self.logvar = nn.Linear(width, 8), nn.Linear(width, 8)
        self.decoder = stack(a=nn.Linear(8, width), act=nn.ReLU(), out=nn.Linear(width, 256))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        return self.decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean)), mean, logvar


@healthy(
    "contact13b-healthy-summed",
    huge("*", 500.0),
    source="https://github.com/SeldonIO/alibi-detect/issues/90",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def healthy_summed(width: int) -> Setup:
    """The evidence bound is summed over pixels and pictures, so that the loss is in the thousands and its
    gradient with it; the optimizer divides by its size, and the model learns."""
    mix = normal(seeded(43), 6, 256) / math.sqrt(6)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 32, 6) @ mix + 0.1 * normal(g, 32, 256)
        return x, x

    def loss(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        made, mean, logvar = output
        return (made - x).square().sum() + 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()

    return setup(_Summed(width), sample, loss)
