"""What strangers asked about and was as it should be."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, huge, loss_of, no_gradient, training, zero_at_first
from .data import Sample, clusters, discs, frozen, normal, seeded, setup, stack, textures, trained
from .registry import FLOAT32, Setup, healthy


def starts_above(value: float) -> Claim:
    """The loss starts above a number."""

    def claim(ready: Setup) -> tuple[bool, str]:
        loss = loss_of(ready).item()
        return loss > value, f"loss at first = {loss:.4g}"

    return claim


def ends_below_zero(steps: int = 100) -> Claim:
    """The loss starts above zero and is below it in the end."""

    def claim(ready: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(ready, steps)]
        return losses[0] > 0 > losses[-1], f"loss from {losses[0]:.3g} to {losses[-1]:.3g}"

    return claim


class Distilled(nn.Module):
    """The encoder of a student beside that of its frozen teacher."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.teacher = frozen(self.encoder(width, 2 * width))
        self.student = self.encoder(width // 2, 2 * width)

    @staticmethod
    def encoder(width: int, out: int) -> nn.Sequential:
        return stack(
            one=nn.Conv2d(3, width, 3, padding=1),
            norm1=nn.BatchNorm2d(width),
            act=nn.ReLU(),
            two=nn.Conv2d(width, out, 3, padding=1),
            norm2=nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            aim = self.teacher(x)
        return self.student(x), aim


@healthy(
    "contact15a-healthy-thousands",
    starts_above(1000),
    source="https://github.com/SimonZeng7108/efficientsam3/issues/20",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def thousands(width: int) -> Setup:
    """The features of a teacher are matched by a student under a loss that is summed over channels and
    places: it starts in the thousands and stays above a thousand for long, which is as it should be."""

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return (output[0] - output[1]).square().flatten(1).sum(1).mean()

    return setup(Distilled(width), textures(number=8), loss, 3e-3)


class Detector(nn.Module):
    """Scores of classes and boxes at every place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = stack(
            one=nn.Conv2d(1, width, 3, padding=1),
            norm1=nn.BatchNorm2d(width),
            act1=nn.SiLU(),
            two=nn.Conv2d(width, width, 3, padding=1),
            norm2=nn.BatchNorm2d(width),
            act2=nn.SiLU(),
        )
        self.score, self.box = nn.Conv2d(width, 1, 1), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return self.score(x), self.box(x)


def boxes() -> Sample:
    """Return pictures of a disc; the target is, at all its places, how far away the ends of its box are."""
    plain = discs(8)
    lines = torch.arange(12.0)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        picture, mask = plain(g)
        rows, columns = mask.amax(3)[:, 0], mask.amax(2)[:, 0]
        ends = []
        for marks, place in ((rows, lines[:, None]), (columns, lines[None, :])):
            low = torch.where(marks > 0, lines, 12.0).amin(1)[:, None, None]
            high = torch.where(marks > 0, lines, -1.0).amax(1)[:, None, None]
            ends += [(place - low).expand(-1, 12, 12), (high - place).expand(-1, 12, 12)]
        return picture, (mask, torch.stack(ends, 1))

    return sample


def detector_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the weighted losses of boxes and scores, times the number of pictures."""
    (score, box), (mask, ends) = output, target
    found = mask.sum().clamp(min=1)
    scores = F.binary_cross_entropy_with_logits(score, mask, reduction="sum") / found
    places = (F.l1_loss(box, ends, reduction="none") * mask).sum() / found
    return (7.5 * places + 0.5 * scores) * len(score)


@healthy(
    "contact15a-healthy-norms",
    huge("*", 300),
    source="https://github.com/WeChatCV/WeDetect/issues/15",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def norms(width: int) -> Setup:
    """A detector's losses have weights and are multiplied by the number of pictures: gradient norms of
    hundreds are quite normal for its kind, and Adam does not mind them."""
    return setup(Detector(width), boxes(), detector_loss, 3e-3)


class Robust(nn.Module):
    """A segmentation under a Student-t distribution of its errors, with learned scale and tail."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Conv2d(width, 1, 1)
        self.scale, self.tail = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.head(self.net(x)).sigmoid(), self.scale, self.tail


def student_loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """Return the negative log likelihood of the errors, by picture element."""
    mask, scale, tail = output
    size, spread, nu = target[0].numel(), scale.exp(), tail.exp()
    error = (mask - target).square().flatten(1).sum(1) / spread
    norm = torch.lgamma((nu + size) / 2) - torch.lgamma(nu / 2) - size / 2 * (math.pi * nu * spread).log()
    return ((nu + size) / 2 * torch.log1p(error / nu) - norm).mean() / size


@healthy(
    "contact15a-healthy-negative",
    ends_below_zero(),
    source="https://github.com/Digital-Dermatology/t-loss/issues/8",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def negative(width: int) -> Setup:
    """The loss is the negative logarithm of a density, which may be above one: it passes zero and goes on to
    negative values as the errors get small, as it should."""
    return setup(Robust(width), discs(), student_loss, 1e-2)


class Averaged(nn.Module):
    """A network and the moving average of its weights, which is kept for later use only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net, self.ema = self.layers(width), frozen(self.layers(width))
        self.ema.load_state_dict(self.net.state_dict())

    @staticmethod
    def layers(width: int) -> nn.Sequential:
        return stack(
            one=nn.Linear(8, width), act1=nn.SiLU(), two=nn.Linear(width, width), act2=nn.SiLU(),
            out=nn.Linear(width, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for mean, new in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                mean.data.lerp_(new.data, 0.01)
        return self.net(x)


@healthy(
    "contact15a-healthy-average",
    no_gradient("ema"),
    source="https://github.com/willisma/SiT/issues/6",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def average(width: int) -> Setup:
    """Half of the parameters belong to the moving average of the other half: frozen, outside the forward
    pass and without any gradient at all times, as an average should be."""
    return setup(Averaged(width), clusters(8, 4), F.cross_entropy, 3e-3)


class Referring(nn.Module):
    """A pretrained body with a new attention to a reference, whose last layer starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.reference = Reference(width)
        self.head = stack(norm=nn.LayerNorm(width), out=nn.Linear(width, 4))

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        x, shown = self.embed(x), self.embed(shown)
        return self.head(x + self.reference(x, shown))


class Reference(nn.Module):
    """Attention to another sequence, whose output is zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(shown).transpose(1, 2) / math.sqrt(x.shape[-1])
        return self.out(scores.softmax(-1) @ self.v(shown))


def shown(edited: bool) -> Sample:
    """Return tokens and a reference; the target is the tokens', to which an edit adds what is shown."""
    w = normal(seeded(41), 8, 4) / math.sqrt(8)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, reference = normal(g, 32, 6, 8), normal(g, 32, 1, 8) + 0.3 * normal(g, 32, 6, 8)
        target = x @ w + (2 * reference.mean(1, keepdim=True) @ w if edited else 0)
        return (x, reference), target

    return sample


@healthy(
    "contact15a-healthy-reference",
    zero_at_first("reference.q", "reference.k", "reference.v"),
    source="https://github.com/hrz2000/FreeEdit/issues/3",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def reference(width: int) -> Setup:
    """A new attention in a pretrained model starts with a zero output layer, so that nothing before it gets a
    gradient in the first step: from the second on it learns."""
    model = Referring(width)
    frozen(model.reference)
    trained(setup(model, shown(False), F.mse_loss, 3e-3), 60)
    model.reference.requires_grad_(True)
    frozen(model.embed)
    return setup(model, shown(True), F.mse_loss, 3e-3)
