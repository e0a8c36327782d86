"""Generative models, metric and self-supervised learning: cases after reports of users."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, not_finite, rises, stuck, training
from .contact17a_1 import diffusion
from .data import choice, clusters, factors, frozen, normal, seeded, setup, sgd, stack, trained
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


def alike_after(module: str, below: float, steps: int) -> Claim:
    """After some steps what differs between the samples is a small part of a module's output."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        output = last.outputs[module].detach().double()
        rows = output.reshape(-1, output.shape[-1])
        share = float((rows - rows.mean(0)).norm() / rows.norm().clamp_min(1e-300))
        return share < below, f"what differs in {module} after {steps} steps = {share:.2g}"

    return claim


def tiny_after(part: str, below: float, steps: int) -> Claim:
    """A part's gradient norm stays small in absolute terms over some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        worst = max(step.norm(part) for step in training(ready, steps))
        return worst < below, f"largest gradient norm of {part} in {steps} steps = {worst:.2g}"

    return claim


def strides(above: float, steps: int = 5) -> Claim:
    """Within some steps the optimizer moves all parameters together by a large part of their norm."""

    def claim(ready: Setup) -> tuple[bool, str]:
        worst, last = 0.0, None
        for _ in training(ready, steps + 1):  # each comes before the optimizer's step
            now = torch.cat([p.detach().flatten() for p in ready.model.parameters()])
            if last is not None:
                worst = max(worst, float((now - last).norm() / last.norm()))
            last = now
        return worst > above, f"largest step / parameters = {worst:.2g}"

    return claim


class Denoiser(nn.Module):
    """A noise predictor with residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inp = nn.Linear(17, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(4)
        )
        self.out = nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


@sick(
    "contact17a-diff-rate",
    [("UNSTABLE", "*")],
    rises(2.0),
    allow=("EXPLODING",),
    source="https://github.com/lucidrains/DALLE2-pytorch/issues/164",
    **ONE,
)
def rate(sick: bool, width: int) -> Setup:
    """A diffusion decoder that still makes noise after hundreds of epochs: its rate is a dozen times too
    high, the loss jumps far up early in the run and takes very long to come back. A rate of 0.003 repairs
    it."""
    return setup(Denoiser(width), diffusion(), F.mse_loss, 0.1 if sick else 3e-3)


class Gan(nn.Module):
    """A generator with the discriminator that judges it; the output is the judgement."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gen = stack(first=nn.Linear(8, width), act=nn.ReLU(), out=nn.Linear(width, 16))
        self.disc = stack(
            first=nn.Linear(16, width),
            act=nn.LeakyReLU(0.2),
            mid=nn.Linear(width, width),
            act2=nn.LeakyReLU(0.2),
            out=nn.Linear(width, 1),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.disc(self.gen(z))


@sick(
    "contact17a-gan-perfectdisc",
    [("VANISHING", "gen")],
    tiny_after("gen", 1e-3, 20),
    allow=("SATURATION",),
    source="https://github.com/iwtw/pytorch-TP-GAN/issues/6",
    **ONE,
)
def perfectdisc(sick: bool, width: int) -> Setup:
    """The discriminator's loss drops to zero at once, and then all gradients of the generator vanish: it is
    trained with log(1 - D), which is flat where D is sure of the fakes. The loss -log D has its slope there
    and repairs it."""
    model = Gan(width)
    real = factors(16, 3, 64)

    def both(g: Generator) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            fake = model.gen(normal(g, 64, 8))
        return torch.cat([real(g)[0] + 1, fake]), torch.cat([torch.ones(64, 1), torch.zeros(64, 1)])

    ready = setup(model.disc, both, F.binary_cross_entropy_with_logits, 1e-2)
    trained(ready, 400)
    frozen(model.disc)

    def loss(judged: Tensor, _: Tensor) -> Tensor:
        return F.logsigmoid(-judged).mean() if sick else -F.logsigmoid(judged).mean()

    return setup(model, lambda g: (normal(g, 64, 8), torch.zeros(1)), loss, sgd(1e-4, 0.9))


class Quantizer(nn.Module):
    """The nearest of some codes for each row, with a straight-through gradient, and its two losses."""

    def __init__(self, number: int, size: int) -> None:
        super().__init__()
        self.codes = nn.Parameter((torch.rand(number, size) * 2 - 1) / number)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        near = torch.cdist(x, self.codes).argmin(1)
        code = self.codes[near]
        extra = F.mse_loss(code, x.detach()) + 0.25 * F.mse_loss(code.detach(), x)
        return x + (code - x).detach(), extra


class Tokens(nn.Module):
    """An autoencoder of features through a codebook; the output is the reconstruction and the extra loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enc = stack(first=nn.Linear(16, width), act=nn.ReLU(), out=nn.Linear(width, 8))
        self.vq = Quantizer(32, 8)
        self.dec = stack(first=nn.Linear(8, width), act=nn.ReLU(), out=nn.Linear(width, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code, extra = self.vq(self.enc(x))
        return self.dec(code), extra


@sick(
    "contact17a-vae-codebook",
    [("BOTTLENECK", "vq")],
    alike_after("vq", 0.05, 18),
    allow=("DEAD", "UNSTABLE", "EXPLODING"),
    source="https://github.com/ByteVisionLab/TokenFlow/issues/28",
    **ONE,
)
def codebook(sick: bool, width: int) -> Setup:
    """A codebook for the features of an image encoder collapses: the codes start in a tiny cube while the
    encoder's outputs lie far off on one side, so one code is nearest for all, only it is trained, and the
    decoder sees a constant. Normalised encodings and codes that start from some of them share the data
    out."""
    points = clusters(16, 8, 64, 0.3)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = points(g)[0] + 3
        return x, x

    def loss(output: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return F.mse_loss(output[0], x) + output[1]

    model = Tokens(width)
    if not sick:
        model.enc.add_module("norm", nn.BatchNorm1d(8, affine=False))
        with torch.no_grad():
            model.vq.codes.copy_(model.enc(sample(seeded(41))[0])[:32])
    return setup(model, sample, loss, 3e-3)


class Patches(nn.Module):
    """A small transformer over the patches of a picture, then cosines to the classes' weights."""

    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.feature = nn.Linear(width, width)
        self.classes = nn.Parameter(0.01 * torch.randn(kinds, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        for layer in self.layers:
            h = layer(h)
        feature = self.feature(h.mean(1))
        return F.normalize(feature, dim=1) @ F.normalize(self.classes, dim=1).T


def faces(kinds: int = 8, number: int = 32) -> object:
    """Pictures of 16 patches, some of which tell the class."""
    looks = normal(seeded(42), kinds, 16, 12)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, kinds, number)
        return looks[kind] + 0.7 * normal(g, number, 16, 12), kind

    return sample


def arcface(cosine: Tensor, kind: Tensor, scale: float = 64.0, margin: float = 0.5) -> Tensor:
    """Cross entropy of scaled cosines, with a margin on the angle of the right class."""
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    hit = F.one_hot(kind, cosine.shape[1]).bool()
    return F.cross_entropy(scale * torch.where(hit, (angle + margin).cos(), cosine), kind)


@sick(
    "contact17a-metric-arcrate",
    [("UNSTABLE", "*")],
    every(strides(0.5), stuck(25.0)),
    allow=("SATURATION", "EXPLODING", "BOTTLENECK"),
    source="https://github.com/deepinsight/insightface/issues/2144",
    **ONE,
)
def arcrate(sick: bool, width: int) -> Setup:
    """ArcFace on a vision transformer with the rate of 0.1 that suits a ResNet: with a scale of 64 the steps
    throw the features about and the loss stays where it is. A rate a hundred times lower converges."""
    return setup(Patches(width, 8), faces(), arcface, sgd(0.1 if sick else 1e-3, 0.9))


@sick(
    "contact17a-metric-rawsupcon",
    [("NUMERICAL", "*")],
    not_finite(3, loss=True),
    allow=("SATURATION",),
    source="https://github.com/HobbitLong/SupContrast/issues/50",
    **ONE,
)
def rawsupcon(sick: bool, width: int) -> Setup:
    """A supervised contrastive loss gets features that nobody normalised: over a temperature of 0.07 a
    row's product with itself is so far above all others that their exponentials are zero, the logarithm of
    their sum is infinite and the loss NaN. Normalised features repair it."""
    model = stack(
        first=nn.Linear(16, 2 * width),
        bn1=nn.BatchNorm1d(2 * width),
        act=nn.ReLU(),
        mid=nn.Linear(2 * width, 2 * width),
        bn2=nn.BatchNorm1d(2 * width),
    )

    def loss(z: Tensor, kind: Tensor) -> Tensor:
        z = z if sick else F.normalize(z, dim=1)
        logits = z @ z.T / 0.07
        logits = logits - logits.max(1, keepdim=True).values.detach()
        other = 1 - torch.eye(len(z))
        mask = (kind[:, None] == kind[None]).float() * other
        logs = logits - (logits.exp() * other).sum(1, keepdim=True).log()
        return -((mask * logs).sum(1) / mask.sum(1).clamp_min(1)).mean()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 16, 16)
        return torch.cat([x + 0.6 * normal(g, 16, 16), x + 0.6 * normal(g, 16, 16)]), torch.arange(16).repeat(
            2
        )

    return setup(model, sample, loss, 3e-3)


class SimSiam(nn.Module):
    """Two views through one encoder and one predictor; the output is the loss."""

    def __init__(self, width: int, stop: bool) -> None:
        super().__init__()
        self.stop = stop
        self.enc = stack(
            first=nn.Linear(16, 2 * width),
            bn1=nn.BatchNorm1d(2 * width),
            act1=nn.ReLU(),
            mid=nn.Linear(2 * width, 2 * width),
            bn2=nn.BatchNorm1d(2 * width),
            act2=nn.ReLU(),
            out=nn.Linear(2 * width, width),
        )
        self.pred = stack(first=nn.Linear(width, width // 4), act=nn.ReLU(), out=nn.Linear(width // 4, width))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        za, zb = self.enc(torch.cat([a, b])).chunk(2)
        pa, pb = self.pred(torch.cat([za, zb])).chunk(2)
        if self.stop:
            za, zb = za.detach(), zb.detach()
        return 1 - (F.cosine_similarity(pa, zb) + F.cosine_similarity(pb, za)).mean() / 2


@sick(
    "contact17a-ssl-nostop",
    [("BOTTLENECK", "enc")],
    alike_after("enc", 0.5, 20),
    source="https://github.com/PatrickHua/SimSiam/issues/39",
    **ONE,
)
def nostop(sick: bool, width: int) -> Setup:
    """SimSiam without its stop-gradient: both branches are pulled together, all samples get one direction and
    the loss is at its best within a few steps with nothing learnt. With the projections detached the
    predictor has to follow, and the features stay apart."""
    points = clusters(16, 8, 64, 0.5)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = points(g)[0]
        return (x + 0.4 * normal(g, *x.shape), x + 0.4 * normal(g, *x.shape)), torch.zeros(1)

    return setup(SimSiam(width, not sick), sample, lambda output, _: output, 1e-2)
