"""Healthy trainings that made their users ask: vision, generative models, distillation, probing."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, huge, no_gradient, training, zero_at_first
from .contact17a_1 import diffusion, marks
from .data import clusters, frozen, normal, seeded, setup, stack, textures, trained, uniform
from .registry import FLOAT32, Setup, healthy

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


def goes_negative(steps: int = 120) -> Claim:
    """The loss is above zero at first and below zero after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(ready, steps)]
        return losses[0] > 0 > losses[-1], f"loss goes from {losses[0]:.2g} to {losses[-1]:.2g}"

    return claim


def unmoved(part: str, steps: int = 20) -> Claim:
    """A part's parameters get gradients and are still, to the bit, what they were after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        module = dict(ready.model.named_modules())[part]
        before = [p.detach().clone() for p in module.parameters()]
        *_, last = training(ready, steps)
        same = all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        return same and last.norm(part) > 0, f"gradient norm of {part} = {last.norm(part):.2g}, same: {same}"

    return claim


def wavers(times: float, steps: int = 40) -> Claim:
    """Over some steps the loss falls by less than a fifth, and its largest is a multiple of its smallest."""

    def claim(ready: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(ready, steps)]
        half = steps // 2
        falls = sum(losses[half:]) / max(sum(losses[:half]), 1e-12)
        spread = max(losses) / min(losses)
        return (
            spread > times and falls > 0.8,
            f"largest / smallest loss {spread:.2g}, second / first half {falls:.2g}",
        )

    return claim


@healthy(
    "contact17a-healthy-firstblock",
    no_gradient("backbone.block0"),
    source="https://github.com/FangyunWei/SLRT/issues/74",
    **ONE,
)
def firstblock(width: int) -> Setup:
    """The first block of a pretrained convolutional backbone has no gradient at any step: it is frozen on
    purpose, to save memory, and all above it is fine-tuned."""

    def block(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())

    backbone = stack(
        block0=block(3, width), pool=nn.MaxPool2d(2), block1=block(width, width), block2=block(width, width)
    )
    model = stack(backbone=backbone, gap=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(width, 6))
    trained(setup(model, textures(6), F.cross_entropy, 3e-3), 60)
    frozen(backbone.block0)
    model.head = nn.Linear(width, 4)
    return setup(model, textures(4), F.cross_entropy, 2e-3)


class Queries(nn.Module):
    """A detector: an encoder scores its places, the best become queries, cut from the graph, of a decoder."""

    def __init__(self, width: int, kinds: int = 3, number: int = 6) -> None:
        super().__init__()
        self.number = number
        self.enc = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )
        self.enc_score = nn.Linear(width, kinds)
        self.dec = nn.ModuleDict(
            {
                "cross": nn.MultiheadAttention(width, 4, batch_first=True),
                "norm": nn.LayerNorm(width),
                "ffn": nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)),
            }
        )
        self.dec_score = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        memory = self.enc(x).flatten(2).mT
        first = self.enc_score(memory)
        best = first.amax(2).topk(self.number, 1).indices
        h = memory.gather(1, best[..., None].expand(-1, -1, memory.shape[2])).detach()
        h = self.dec["norm"](h + self.dec["cross"](h, memory, memory, need_weights=False)[0])
        return first, self.dec_score(h + self.dec["ffn"](h)), best


def no_path(early: str, late: str) -> Claim:
    """Nothing of the loss on the decoder's answers gets back through the queries to the encoder's score."""

    def claim(ready: Setup) -> tuple[bool, str]:
        _, second, _ = ready.model(ready.make_batch())
        second.square().sum().backward()
        modules = dict(ready.model.named_modules())
        found = [all(p.grad is None for p in modules[name].parameters()) for name in (early, late)]
        return found == [
            True,
            False,
        ], f"no gradient from the decoder's answers: {early} {found[0]}, {late} {found[1]}"

    return claim


@healthy(
    "contact17a-healthy-cutqueries",
    no_path("enc_score", "dec_score"),
    source="https://github.com/Peterande/D-FINE/issues/121",
    **ONE,
)
def cutqueries(width: int) -> Setup:
    """A detection transformer cuts its content queries from the graph, so no gradient of the decoder's loss
    returns by them: that is by design, the encoder learns from its own scores and through the memory."""

    def loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        first, second, best = output
        right = target.flatten(2).mT
        chosen = right.gather(1, best[..., None].expand(-1, -1, right.shape[2]))
        own = F.binary_cross_entropy_with_logits(first, right, reduction="sum")
        return (own + F.binary_cross_entropy_with_logits(second, chosen, reduction="sum")) / target.sum()

    return setup(Queries(width), marks(), loss, 2e-3)


class Pose(nn.Module):
    """Positions of joints, each with the size of its error."""

    def __init__(self, width: int, joints: int = 4) -> None:
        super().__init__()
        self.body = stack(
            first=nn.Linear(24, width), act=nn.ReLU(), mid=nn.Linear(width, width), act2=nn.ReLU()
        )
        self.where, self.sigma = nn.Linear(width, joints), nn.Linear(width, joints)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.where(h), self.sigma(h)


@healthy(
    "contact17a-healthy-likelihood",
    goes_negative(),
    source="https://github.com/jeffffffli/res-loglikelihood-regression/issues/33",
    **ONE,
)
def likelihood(width: int) -> Setup:
    """The loss of a pose regression turns negative in its first epoch: it is the negative logarithm of a
    density, which may be above one, so this is how it looks when the errors get small."""
    mix = normal(seeded(51), 24, 4) / 24**0.5

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 24)
        return x, 0.4 * (x @ mix)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        where, logs = output[0], output[1].clamp(-5, 5)
        return (math.log(2) + logs + (where - target).abs() * (-logs).exp()).mean()

    return setup(Pose(width), sample, loss, 3e-3)


class Probe(nn.Module):
    """A channel adapter, a pretrained network, and a linear probe."""

    def __init__(self, width: int, backbone: nn.Module) -> None:
        super().__init__()
        self.chan_conv = nn.Linear(24, 16)
        self.backbone = backbone.eval()
        self.probe = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.probe(self.backbone(self.chan_conv(x)))


@healthy(
    "contact17a-healthy-probing",
    unmoved("backbone"),
    source="https://github.com/BINE022/EEGPT/issues/18",
    **ONE,
)
def probing(width: int) -> Setup:
    """In a linear probing the pretrained network has its gradients but never changes: it requires them since
    an adapter in front of it learns through it, and is left out of the optimizer on purpose."""
    backbone = stack(
        first=nn.Linear(16, width), norm=nn.LayerNorm(width), act=nn.GELU(), out=nn.Linear(width, width)
    )
    trained(
        setup(
            nn.Sequential(backbone, nn.GELU(), nn.Linear(width, 8)), clusters(16, 8), F.cross_entropy, 3e-3
        ),
        80,
    )
    model = Probe(width, backbone)

    def learns() -> list[Tensor]:
        return [*model.chan_conv.parameters(), *model.probe.parameters()]

    return setup(model, clusters(24, 4, 32, 1.0), F.cross_entropy, 3e-3, trains=learns)


class NonLocal(nn.Module):
    """A convolutional net with a non-local block whose last normalisation starts with a scale of zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.theta, self.phi, self.g = (nn.Conv2d(width, width // 2, 1) for _ in range(3))
        self.w = nn.Sequential(nn.Conv2d(width // 2, width, 1), nn.BatchNorm2d(width))
        nn.init.zeros_(self.w[1].weight)
        self.tail = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        a, b, v = (conv(h).flatten(2) for conv in (self.theta, self.phi, self.g))
        mixed = (v @ (a.mT @ b).softmax(-1).mT).unflatten(2, h.shape[2:])
        return self.out(self.tail(h + self.w(mixed)).mean((2, 3)))


@healthy(
    "contact17a-healthy-zerogamma",
    zero_at_first("theta", "phi", "g", "w.0"),
    source="https://github.com/AlexHex7/Non-local_pytorch/issues/38",
    **ONE,
)
def zerogamma(width: int) -> Setup:
    """A non-local block is put into a network with the scale of its last normalisation at zero, and all
    within it has no gradient in the first step: the block is to start as the identity, and the scale, which
    does get a gradient, opens it."""
    return setup(NonLocal(width), textures(4, 32), F.cross_entropy, 2e-3)


class PointVae(nn.Module):
    """A variational autoencoder of sets of points, each with a latent point of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enc = stack(first=nn.Linear(3, width), act=nn.ReLU(), out=nn.Linear(width, 8))
        self.dec = stack(first=nn.Linear(4, width), act=nn.ReLU(), out=nn.Linear(width, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logs = self.enc(x).chunk(2, -1)
        logs = logs.clamp(-10, 4) - 2
        z = mean + logs.exp() * torch.randn_like(mean)
        return self.dec(z), mean, logs


@healthy(
    "contact17a-healthy-pointsum",
    huge("*", 500.0),
    source="https://github.com/nv-tlabs/LION/issues/53",
    **ONE,
)
def pointsum(width: int) -> Setup:
    """The loss of a point cloud autoencoder is in the thousands at first, and so are its gradients: it is a
    sum over all points. Adam does not mind the scale, and the clouds are soon rebuilt well."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        direction = F.normalize(normal(g, 8, 1024, 3), dim=-1)
        x = direction * (0.5 + uniform(g, 8, 1, 3)) + 0.5 * normal(g, 8, 1, 3)
        return x, x

    def loss(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        rebuilt, mean, logs = output
        kl = 0.5 * (mean.square() + (2 * logs).exp() - 2 * logs - 1)
        return ((rebuilt - x).abs().sum((1, 2)) + 1e-3 * kl.sum((1, 2))).mean()

    return setup(PointVae(width), sample, loss, 3e-3)


class Distil(nn.Module):
    """A student and a teacher that only answers; the output has both."""

    def __init__(self, width: int, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = stack(first=nn.Linear(16, width // 2), act=nn.ReLU(), out=nn.Linear(width // 2, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.student(x), wanted


@healthy(
    "contact17a-healthy-teacher",
    no_gradient("teacher"),
    source="https://github.com/huangzongmou/yolov8_Distillation/issues/5",
    **ONE,
)
def teacher(width: int) -> Setup:
    """The parameters of the teacher in a distillation require a gradient and never get one: it runs without a
    graph and is not in the optimizer, it is only there to be copied."""
    big = stack(first=nn.Linear(16, 2 * width), act=nn.ReLU(), out=nn.Linear(2 * width, 8))
    points = clusters(16, 8, 32, 1.0)
    trained(setup(big, points, F.cross_entropy, 3e-3), 150)
    model = Distil(width, big)

    def loss(output: tuple[Tensor, Tensor], kind: Tensor) -> Tensor:
        soft = F.kl_div((output[0] / 2).log_softmax(1), (output[1] / 2).softmax(1), reduction="batchmean")
        return 4 * soft + 0.5 * F.cross_entropy(output[0], kind)

    return setup(model, points, loss, 3e-3, trains=model.student.parameters)


@healthy(
    "contact17a-healthy-timesteps",
    wavers(1.5),
    source="https://github.com/zoubohao/DenoisingDiffusionProbabilityModel-ddpm-/issues/48",
    converged=True,
    **ONE,
)
def timesteps(width: int) -> Setup:
    """The loss of a diffusion model goes up and down from batch to batch and has long stopped falling,
    while its pictures still get better: each batch draws its levels of noise at random, and what is left of
    the loss is mostly what no model can know."""
    model = stack(
        first=nn.Linear(17, 2 * width),
        act=nn.SiLU(),
        mid=nn.Linear(2 * width, 2 * width),
        act2=nn.SiLU(),
        out=nn.Linear(2 * width, 16),
    )
    return trained(setup(model, diffusion(8), F.mse_loss, 1e-3), 700)
